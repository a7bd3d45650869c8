"""Rewrite an adapter so that no reader has a scaling to get wrong: folded into B, one rank for all.

Runtimes read `r`, `lora_alpha`, `use_rslora` and the two patterns differently; with r = lora_alpha, no
patterns and scaling 1 they all agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorasmith.errors import AdapterFileError
from lorasmith.lora import Adapter, Factors, LoRAConfig

_KEPT = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Folded:
    """What `fold_scaling` made.

    Attributes:
        adapter: scaling 1 in every module.
        is_exact: every number of the deltas' factors is the one it was; else factors are float32 and
            scaling · B was rounded to it once.
        largest_error: the largest relative error of an element of A or scaling · B.
    """

    adapter: Adapter
    is_exact: bool
    largest_error: float


def fold_scaling(adapter: Adapter) -> Folded:
    """B ← scaling · B in every module: in the factors' own dtype where no bit is lost, else in float32."""
    factors, errors = {}, [0.0]
    for path, f in adapter.factors.items():
        factors[path], error = _fold(f)
        errors.append(error)
    # one dtype for the file: a reader may take that of the first tensor for all
    if len({f.A.dtype for f in factors.values()}) > 1:
        factors = {path: f.to(dtype=torch.float32) for path, f in factors.items()}
    return Folded(replace(adapter, factors=factors), max(errors) == 0, max(errors))


def pad_ranks(adapter: Adapter) -> Adapter:
    """Zero rows of A and zero columns of B up to the largest rank; every delta stays what it is."""
    rank = max(f.rank for f in adapter.factors.values())
    return replace(adapter, factors={path: _pad(f, rank) for path, f in adapter.factors.items()})


def make_portable(adapter: Adapter) -> Folded:
    """The adapter with scaling 1, one rank, and a config of plain lists and numbers.

    Raises:
        AdapterFileError: it has no factors, or more than those of linear layers, which no two runtimes treat alike.
    """
    require_plain(adapter, "--to portable")
    folded = fold_scaling(adapter)
    padded = pad_ranks(folded.adapter)
    rank = next(iter(padded.factors.values())).rank
    config = LoRAConfig(
        rank=rank, alpha=float(rank), targets=_plain_targets(adapter), init=adapter.config.init
    )
    return replace(folded, adapter=replace(padded, config=config))


def require_plain(adapter: Adapter, target: str) -> None:
    """Refuse what only PEFT can carry.

    Raises:
        AdapterFileError: no factors, trained biases, or more than factors of linear layers.
    """
    if not adapter.factors:
        raise AdapterFileError(f"export {target}: the adapter has no factors")
    if beyond := adapter.beyond_linear:
        raise AdapterFileError(
            f"export {target}: the adapter holds {beyond}, which only PEFT's format can carry.\n"
            "  Export with --to peft, or merge it into a model of its own (lorasmith merge)."
        )
    if adapter.biases:
        raise AdapterFileError(
            f"export {target}: the adapter carries {len(adapter.biases)} trained biases. vLLM refuses them, and SGLang, "
            "llama.cpp and MLX have no place for them.\n  Export with --to peft, or train with bias=none."
        )


def _fold(f: Factors) -> tuple[Factors, float]:
    """The folded factors, and the largest relative error of an element."""
    wide = f.B.detach().double() * f.scaling
    dtype = torch.promote_types(f.A.dtype, f.B.dtype)
    # a product with a power of two has the same digits, unless it leaves the dtype's range
    if dtype in _KEPT and math.frexp(f.scaling)[0] == 0.5 and torch.equal(wide.to(dtype).double(), wide):
        return Factors(f.A.detach().to(dtype), wide.to(dtype), 1.0), 0.0
    if f.scaling == 1.0 and dtype in _KEPT:
        return Factors(f.A.detach().to(dtype), f.B.detach().to(dtype), 1.0), 0.0
    A, B = f.A.detach().float(), wide.float()
    return Factors(A, B, 1.0), max(_relative(A, f.A.detach().double()), _relative(B, wide))


def _relative(stored: Tensor, exact: Tensor) -> float:
    error, size = (stored.double() - exact).abs(), exact.abs()
    return float((error / torch.where(size > 0, size, torch.ones_like(size))).max())


def _pad(f: Factors, rank: int) -> Factors:
    missing = rank - f.rank
    return f if missing == 0 else Factors(pad(f.A, (0, 0, 0, missing)), pad(f.B, (0, missing)), f.scaling)


def _plain_targets(adapter: Adapter) -> tuple[str, ...]:
    """Names that every reader understands: a list, without layers or exclusions that some ignore."""
    config, paths = adapter.config, sorted(adapter.factors)
    names = sorted({path.rpartition(".")[2] for path in paths})
    is_whole = not config.exclude and config.layers is None and not any(n.isdigit() for n in names)
    if is_whole and config.targets == "all-linear":
        return tuple(names)
    if is_whole and isinstance(config.targets, tuple):
        return config.targets
    return tuple(paths)
