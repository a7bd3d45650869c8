"""Does an adapter fit a base, and can it do anything? Every problem as plain data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lorasmith.formats.header import AdapterHeader
from lorasmith.formats.peft_modules import ModuleHeader
from lorasmith.formats.peft_rules import TargetRules, suffixes
from lorasmith.lora import Adapter

_NO_LAYER = "-"
_HIGHEST_USUAL_SCALING = 64.0


@dataclass(frozen=True, slots=True)
class Problem:
    """`module` is a path, or empty where the whole adapter is meant."""

    kind: str
    module: str
    message: str


@dataclass(frozen=True)
class Coverage:
    """Which modules of the base have factors.

    Attributes:
        table: last part of the module path → layer number → (with factors, targeted).
            Modules outside numbered layers are under `"-"`.
        problems: everything that does not fit.
    """

    table: Mapping[str, Mapping[str, tuple[int, int]]]
    problems: tuple[Problem, ...]

    @property
    def is_complete(self) -> bool:
        """Every target is in the base and has factors that fit, and nothing is left over."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        table = {name: {k: list(v) for k, v in row.items()} for name, row in self.table.items()}
        return {"table": table, "problems": [asdict(p) for p in self.problems]}

    def table_text(self) -> str:
        """One line for each kind of module."""
        width = max(map(len, self.table), default=0)
        return "\n".join(f"{name:<{width}}  {_row(row)}" for name, row in self.table.items())

    def __str__(self) -> str:
        return "\n".join([self.table_text(), *(f"{p.kind}: {p.message}" for p in self.problems)])


def check_coverage(header: AdapterHeader, base_shapes: Mapping[str, tuple[int, ...]]) -> Coverage:
    """Compare an adapter with the base's tensors; no weights are needed.

    Args:
        base_shapes: parameter name (`model.layers.0.self_attn.q_proj.weight`) → shape.
    """
    base_shapes = _with_tied_head(header, base_shapes)
    base = {
        n.removesuffix(".weight"): s for n, s in base_shapes.items() if n.endswith(".weight") and len(s) >= 2
    }
    base |= {path: base_shapes[path] for path in _stacks(header) if path in base_shapes}
    targeted = _targeted(header, base)
    problems = [
        *_unmatched_targets(header, targeted),
        *(_missing_factors(p, base[p]) for p in targeted if p not in header.modules),
        *_misplaced(header.modules, base),
        *_misshapen(header, base),
        *_bias_problems(header, base_shapes),
        *_whole_problems(header, base_shapes),
    ]
    return Coverage(_table(targeted, header.modules), tuple(problems))


def check_values(adapter: Adapter) -> list[Problem]:
    """Look at the numbers: factors without effect, not finite, or scaled out of all proportion."""
    problems = [
        Problem("non-finite", path, f"{path}: numbers that are not finite")
        for path, f in adapter.factors.items()
        if not (torch.isfinite(f.A).all() and torch.isfinite(f.B).all())
    ]
    idle = [path for path, f in adapter.factors.items() if not (f.A.any() and f.B.any())]
    if len(idle) == len(adapter.factors) and not (adapter.biases or adapter.extras):
        problems.append(
            Problem("no-effect", "", "the adapter has no effect: B (or A) is zero in every module")
        )
    else:
        # a router may never have chosen an expert; that is no fault of the adapter
        idle = [path for path in idle if adapter.factors[path].layout.kind != "expert"]
        problems += [Problem("zero-factors", p, f"{p}: B (or A) is zero, so it has no effect") for p in idle]
    for path, f in adapter.factors.items():
        if not 1 / _HIGHEST_USUAL_SCALING < f.scaling < _HIGHEST_USUAL_SCALING:
            message = f"{path}: scaling {f.scaling:g} is unusual; were alpha and rank mixed up?"
            problems.append(Problem("extreme-scaling", path, message))
    return problems


def _targeted(header: AdapterHeader, base: Mapping[str, tuple[int, ...]]) -> list[str]:
    c = header.config
    if c.targets == "all-linear":  # headers do not tell a linear layer from an embedding; its namesakes do
        rules = TargetRules(tuple({path.rpartition(".")[2] for path in header.modules}), c.exclude, c.layers)
    else:
        rules = TargetRules(c.targets, c.exclude, c.layers)
    stacks = _stacks(header)
    return [path for path in base if path in stacks or rules.selects(path)]


def _stacks(header: AdapterHeader) -> set[str]:
    return {path for path, m in header.modules.items() if m.layout.kind == "expert"}


def _with_tied_head(
    header: AdapterHeader, base_shapes: Mapping[str, tuple[int, ...]]
) -> Mapping[str, tuple[int, ...]]:
    """A head that is tied to the embedding has no tensor of its own in a base's file."""
    name = "lm_head.weight"
    shapes = [s for n, s in base_shapes.items() if n.rpartition(".weight")[0].endswith("embed_tokens")]
    is_meant = "lm_head" in header.modules or name in header.weights
    return (
        {**base_shapes, name: shapes[0]} if is_meant and shapes and name not in base_shapes else base_shapes
    )


def _unmatched_targets(header: AdapterHeader, targeted: list[str]) -> Iterable[Problem]:
    targets = header.config.targets
    if isinstance(targets, str):
        if not targeted:
            yield Problem("unmatched-target", "", f'targets="{targets}" matches nothing in this base')
        return
    endings = {suffix for path in targeted for suffix in suffixes(path)}
    for target in targets:
        if target not in endings:
            yield Problem("unmatched-target", "", f'target "{target}" matches nothing in this base')


def _missing_factors(path: str, shape: tuple[int, ...]) -> Problem:
    return Problem("missing-factors", path, f"{path} {shape} is targeted but has no factors")


def _misplaced(modules: Iterable[str], base: Mapping[str, tuple[int, ...]]) -> Iterable[Problem]:
    by_ending = {suffix: path for path in base for suffix in suffixes(path)}
    for path in modules:
        if path not in base:
            near = next((by_ending[s] for s in suffixes(path) if s.count(".") > 1 and s in by_ending), None)
            hint = f"; the base has {near}" if near else ""
            yield Problem("not-in-base", path, f"{path} has factors but is not in this base{hint}")


def _misshapen(header: AdapterHeader, base: Mapping[str, tuple[int, ...]]) -> Iterable[Problem]:
    shared = {path: m for path, m in header.modules.items() if path in base}
    wanted = {path: _weight_shape(m) for path, m in shared.items()}
    # Conv1D (GPT-2) stores weights transposed, and not every file says so: all modules show it together
    linears = [path for path, m in shared.items() if m.layout.kind == "linear"]
    is_transposed = header.fan_in_fan_out or all(base[p] == wanted[p][::-1] for p in linears)
    for path, shape in wanted.items():
        kind = shared[path].layout.kind
        flipped = {"linear": shape[::-1] if is_transposed else shape, "expert": (shape[0], *shape[:0:-1])}
        if base[path] not in (shape, flipped.get(kind, shape)):
            m = shared[path]
            message = (
                f"{path}: A {m.A_shape} and B {m.B_shape} need a weight of {shape}, the base has {base[path]}"
            )
            yield Problem("wrong-shape", path, message)


def _weight_shape(m: ModuleHeader) -> tuple[int, ...]:
    """The shape that the weight under a pair of factors must have."""
    out, width, layout = m.B_shape[0], m.A_shape[1], m.layout
    if layout.kind == "embedding":
        return (width, out)
    if layout.kind == "conv":
        return (out, width // math.prod(layout.kernel) // layout.groups, *layout.kernel)
    return (m.A_shape[0] // m.rank, out, width) if layout.kind == "expert" else (out, width)


def _whole_problems(header: AdapterHeader, base_shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Problem]:
    for name, shape in header.weights.items():
        if base_shapes.get(name) != shape:
            has = f"has {base_shapes[name]}" if name in base_shapes else "has no such parameter"
            yield Problem("wrong-weight", name, f"{name}: whole trained weight of {shape}, the base {has}")
    for (path, part), slot in header.slots.items():
        found = base_shapes.get(f"{path}.weight")
        if part == "rows" and (found is None or len(found) != 2 or found[1] != slot.shape[1]):
            has = f"has {found}" if found else "has no such embedding"
            yield Problem("wrong-rows", path, f"{path}: trained rows of {slot.shape}, the base {has}")


def _bias_problems(header: AdapterHeader, base_shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Problem]:
    for path, shape in header.biases.items():
        found = base_shapes.get(f"{path}.bias")
        if found != shape:
            has = f"has {found}" if found else "has none"
            yield Problem("wrong-bias", path, f"{path}: trained bias of {shape}, the base {has}")


def _table(targeted: list[str], modules: Mapping[str, ModuleHeader]) -> dict[str, dict[str, tuple[int, int]]]:
    table: dict[str, dict[str, tuple[int, int]]] = {}
    wanted = set(targeted)
    for path in sorted(wanted | modules.keys(), key=lambda p: (p.rpartition(".")[2], _layer_order(p), p)):
        row = table.setdefault(path.rpartition(".")[2], {})
        layer = _layer(path)
        covered, expected = row.get(layer, (0, 0))
        is_targeted = path in wanted
        row[layer] = (covered + (is_targeted and path in modules), expected + is_targeted)
    return table


def _layer(path: str) -> str:
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return match[1] if match else _NO_LAYER


def _layer_order(path: str) -> int:
    layer = _layer(path)
    return -1 if layer == _NO_LAYER else int(layer)


def _row(row: Mapping[str, tuple[int, int]]) -> str:
    covered, expected = (sum(cell[i] for cell in row.values()) for i in (0, 1))
    gaps = [layer for layer, (has, needs) in row.items() if has < needs]
    layers = f"layers {', '.join(gaps[:8])}{', …' if len(gaps) > 8 else ''} lack some" if gaps else "complete"
    return f"{covered}/{expected}  {layers}"
