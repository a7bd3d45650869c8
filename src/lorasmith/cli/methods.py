"""The methods LoRA is compared with, on the command line: their options, and reading what they wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import load_adapter, print_json, say
from lorasmith.errors import AdapterFileError, ConfigError

if TYPE_CHECKING:
    from torch import nn

    from lorasmith.baselines import Tuned
    from lorasmith.bases import Base
    from lorasmith.engine import Engine
    from lorasmith.lora import Adapter

LORA_FLAGS = ("rank", "alpha", "targets", "exclude", "dropout", "bias", "rslora")
METHOD_FLAGS = (
    "bottleneck", "virtual_tokens", "prefix_hidden", "init_text", "biases", "top_layers", "dimension",
    "projection", "said",
)  # fmt: skip


def _option(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Options of the other methods")


BottleneckOption = Annotated[int | None, _option("houlsby, lin: width between the two products (64).")]
VirtualTokensOption = Annotated[int | None, _option("prefix (5), prompt (20): learned positions.")]
PrefixHiddenOption = Annotated[
    int | None, _option("prefix: width of the network it is trained through (512).")
]
InitTextOption = Annotated[str | None, _option("prefix, prompt: start from this text.")]
BiasesOption = Annotated[str | None, _option("bitfit: own, or added for bases that have none.")]
TopLayersOption = Annotated[int | None, _option("top-k: last decoder layers that train (2).")]
DimensionOption = Annotated[int | None, _option("intrinsic: numbers that train (1000).")]
ProjectionOption = Annotated[str | None, _option("intrinsic: auto, fastfood or sparse.")]
SaidOption = Annotated[bool | None, _option("intrinsic: also one learned multiplier per layer.")]


def with_method_options(settings: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings with the flags of its method in them.

    Raises:
        ConfigError: a flag of LoRA's was given for another method.
    """
    method = settings.get("method", "lora")
    lost = [f"--{name}" for name in LORA_FLAGS if flags[name] is not None] if method != "lora" else []
    if lost:
        raise ConfigError(f"{', '.join(lost)}: belongs to LoRA, and the method is {method}. Leave it out.")
    given = {name: flags[name] for name in METHOD_FLAGS if flags[name] is not None}
    return settings | {"options": settings.get("options", {}) | given} if given else settings


def read_tuned(path: Path) -> Adapter | Tuned:
    """A LoRA adapter, or what another method left."""
    from lorasmith.baselines import is_method, read_method
    from lorasmith.formats import read_adapter

    return read_method(path) if is_method(path) else read_adapter(path)


def load_tuned(path: Path, base: Base, *, allow_base_mismatch: bool = False) -> Adapter | Tuned:
    """`read_tuned`, and check that it was trained on `base`."""
    from lorasmith.baselines import is_method, read_method
    from lorasmith.bases import require_base

    if not is_method(path):
        return load_adapter(path, base, allow_base_mismatch=allow_base_mismatch)
    tuned = read_method(path)
    if not allow_base_mismatch:
        require_base(tuned.provenance, base)
    return tuned


@contextmanager
def put_on(model: nn.Module, tuned: Adapter | Tuned | None) -> Iterator[None]:
    """The model computes as tuned inside the `with`."""
    from lorasmith.baselines import Tuned, applied
    from lorasmith.inject import eject, inject

    if isinstance(tuned, Tuned):
        with applied(model, tuned):
            yield
        return
    if tuned is not None:
        inject(model, tuned)
    try:
        yield
    finally:
        if tuned is not None:
            eject(model)


def the_method(folders: Mapping[str, Path]) -> Path | None:
    """The one directory that another method wrote, if there is one.

    Raises:
        ConfigError: it is not the only one, though such a method changes the model for every request.
    """
    from lorasmith.baselines import is_method

    methods = [folder for folder in folders.values() if is_method(folder)]
    if methods and len(folders) > 1:
        raise ConfigError(
            f"{methods[0]} is not LoRA: its method changes the model for every request, so it cannot share "
            "a batch with other adapters. Give it alone."
        )
    return methods[0] if methods else None


def method_engine(base: Base, tuned: Tuned, *, rows: int = 16) -> Engine:
    """An engine for a model on which `tuned` is; virtual tokens take their part of the context."""
    from lorasmith.engine import Engine

    places = getattr(base.model.config, "max_position_embeddings", None)
    virtual = tuned.options.get("virtual_tokens") or 0
    limit = places - virtual if places is not None and virtual else None
    return Engine(base, max_rows=rows, runner="generic", max_context=limit)


def check_method(
    path: Path, base: Path, quantize: str | None = None
) -> tuple[bool | None, list[dict[str, str]]]:
    """Whether the base matches, and every problem, of what another method left."""
    from lorasmith.baselines import read_method
    from lorasmith.bases import fingerprint_directory, match_base

    try:
        tuned = read_method(path)
    except AdapterFileError as error:
        return None, [{"kind": "unreadable", "module": "", "message": str(error)}]
    matches = match_base(tuned.provenance, fingerprint_directory(base, quantised=quantize))
    message = "it was trained on another base; `lorasmith eval` says what differs"
    problems = [{"kind": "base-mismatch", "module": "", "message": message}] if matches is False else []
    return matches, problems


def inspect_method(path: Path, refused: Path | None, *, as_json: bool) -> None:
    """Tensors, sizes and settings of what another method left."""
    from lorasmith.baselines import read_method

    if refused is not None:
        raise ConfigError(f"{path} holds no LoRA factors: it has no spectrum to plot or to compare.")
    tuned = read_method(path)
    rows: list[dict[str, Any]] = [
        {"path": name, "shape": list(t.shape), "params": t.numel(), "norm": float(t.double().norm()),
         "rank": None, "effective_rank": None, "energy": None}
        for name, t in tuned.tensors.items()
    ]  # fmt: skip
    result = {
        "method": tuned.method, "options": tuned.options, "modules": rows, "params": tuned.num_params,
        "bytes": tuned.num_bytes, "digest": tuned.digest, "base": tuned.provenance.get("base", {}).get("name"),
    }  # fmt: skip
    if as_json:
        print_json(result)
        return
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:  # layer numbers left out, so that like tensors share a line
        groups.setdefault(".".join(p for p in row["path"].split(".") if not p.isdigit()), []).append(row)
    print(f"{'tensors':<52}{'count':>6}{'parameters':>12}{'‖·‖':>10}")
    for name, group in groups.items():
        norm = sum(row["norm"] ** 2 for row in group) ** 0.5
        print(f"{name[-51:]:<52}{len(group):>6}{sum(r['params'] for r in group):>12,}{norm:>10.3g}")
    options = ", ".join(f"{k} {v}" for k, v in tuned.options.items() if v is not None)
    print(f"method: {tuned.method}" + (f" ({options})" if options else ""))
    print(
        f"size: {result['params']:,} parameters, {result['bytes'] / 1e6:.2f} MB; digest {tuned.digest[:16]}"
    )
    say(f"base: {result['base'] or 'not named'}")
