"""A LoRA out of a full fine-tune."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorasmith.analysis.configs import config_for
from lorasmith.analysis.dense import EXACT_LIMIT, best_factors, frobenius_norm, residual_norm
from lorasmith.analysis.lowrank import ratio, require_one_cut
from lorasmith.analysis.tensors import Tensors, load
from lorasmith.errors import BaseMismatchError, ConfigError
from lorasmith.lora import Adapter, Factors, LoRAConfig, compute_dtype

_WEIGHT = ".weight"
# Two-dimensional weights that are no linear layer, or the output head that "all-linear" leaves out.
_NOT_LINEAR = {
    *("wte", "wpe", "shared", "relative_attention_bias"),
    *("lm_head", "output", "head", "score", "classifier"),
}


@dataclass(frozen=True, slots=True)
class ExtractErrors:
    """What the adapter does not hold of tuned − base.

    Attributes:
        relative_error: ‖D − B·A‖_F / ‖D‖_F over the modules that have factors.
        modules: the same by module path.
        not_captured: tensor name → why it changed and yet is not in the adapter.
        captured: share of the energy ‖tuned − base‖² of all comparable tensors that the adapter holds.
    """

    relative_error: float
    modules: dict[str, float]
    not_captured: dict[str, str]
    captured: float


class Extracted(NamedTuple):
    """The adapter, and what it leaves out."""

    adapter: Adapter
    errors: ExtractErrors


class _Module(NamedTuple):
    factors: Factors
    error: float
    norm: float


def extract_from_full(
    base: Tensors,
    tuned: Tensors,
    *,
    rank: int | None = None,
    energy: float | None = None,
    select: Callable[[str], bool] | None = None,
    transposed: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
    exact_limit: int = EXACT_LIMIT,
    progress: Callable[[int, int, str], None] | None = None,
) -> Extracted:
    """Per selected weight, the best B @ A for tuned − base, one tensor in memory at a time.

    Args:
        base: tensor name → tensor or loader; `open_tensors(directory)` gives such a map.
        tuned: the same after the fine-tune.
        rank: of the factors; a matrix with a smaller side gets that side.
        energy: instead of `rank`, the least rank that keeps this share of ‖D‖² in each module.
        select: which module paths may carry factors. By default every two-dimensional `*.weight` whose
            name is not that of an embedding or an output head; with the model at hand, be exact.
        transposed: paths of modules whose weight is stored (in, out), as GPT-2's `Conv1D` does.
        dtype: of the factors.
        exact_limit: the smaller side up to which the SVD is exact in float64. Beyond, it is randomised
            with power iterations; the errors are measured on the factors either way.
        progress: called with (tensors done, tensors in all, name) before each.

    Raises:
        ConfigError: not exactly one of `rank` and `energy`; nothing that is selected changed.
        BaseMismatchError: the two have no tensor name in common, or values are not finite.
    """
    require_one_cut("extract_from_full", rank, energy)
    if not base.keys() & tuned.keys():
        raise BaseMismatchError(
            f"extract_from_full: no tensor name is in both models (base {_some(base)}; tuned {_some(tuned)})"
        )
    chosen = select or looks_linear
    modules: dict[str, _Module] = {}
    not_captured, lost = dict(_unmatched(base, tuned)), [0.0]
    shared = sorted(base.keys() & tuned.keys())
    for done, name in enumerate(shared):
        if progress is not None:
            progress(done, len(shared), name)
        change = _difference(name, load(base, name), load(tuned, name))
        path = name.removesuffix(_WEIGHT)
        if isinstance(change, str):
            not_captured[name] = change
        elif (norm := frobenius_norm(change)) == 0:
            continue
        elif reason := _refusal(name, change, chosen):
            not_captured[name] = reason
            lost.append(norm)
        else:
            D = change.T if path in transposed else change
            cut = None if rank is None else min(rank, *D.shape)
            made = best_factors(D, rank=cut, energy=energy, dtype=dtype, exact_limit=exact_limit)
            modules[path] = _Module(made, residual_norm(D, made), norm)
    return Extracted(_adapter(modules, not_captured), _errors(modules, not_captured, math.hypot(*lost)))


def looks_linear(path: str) -> bool:
    """Whether a module of this name is taken for a linear layer other than the output head."""
    last = path.rpartition(".")[2].lower()
    return "embed" not in last and last not in _NOT_LINEAR


def _difference(name: str, before: Tensor, after: Tensor) -> Tensor | str:
    """tuned − base in at least float32, or why there is none."""
    if before.shape != after.shape:
        return f"its shape changed from {tuple(before.shape)} to {tuple(after.shape)}"
    wide = compute_dtype(torch.promote_types(before.dtype, after.dtype))
    change = after.to(wide) - before.to(wide)
    if not change.isfinite().all():
        raise BaseMismatchError(
            f"extract_from_full: {name} holds NaN or infinity, or overflows; check the files"
        )
    return change


def _refusal(name: str, change: Tensor, chosen: Callable[[str], bool]) -> str:
    """Why a changed tensor cannot become factors; empty where it can."""
    if not name.endswith(_WEIGHT):
        return "it is no module's weight"
    if change.ndim != 2:
        return f"it has {change.ndim} dimension(s), not 2"
    return "" if chosen(name.removesuffix(_WEIGHT)) else "its module is not selected"


def _unmatched(base: Tensors, tuned: Tensors) -> Iterator[tuple[str, str]]:
    for name in sorted(base.keys() ^ tuned.keys()):
        yield name, "it is only in the base" if name in base else "it is only in the tuned model"


def _adapter(modules: dict[str, _Module], not_captured: dict[str, str]) -> Adapter:
    if not modules:
        lines = [f"{name}: {why}" for name, why in list(not_captured.items())[:20]]
        raise ConfigError(
            "extract_from_full: no selected weight differs between the two models, so there is nothing to "
            "extract; check the directories and `select`"
            + ("\n  these changed, but:\n  " + "\n  ".join(lines) if lines else "")
        )
    factors = {path: module.factors for path, module in modules.items()}
    return Adapter(config_for(LoRAConfig(targets=tuple(factors)), factors), factors)


def _errors(modules: dict[str, _Module], not_captured: dict[str, str], lost: float) -> ExtractErrors:
    error = math.hypot(*(m.error for m in modules.values()))
    norm = math.hypot(*(m.norm for m in modules.values()))
    return ExtractErrors(
        relative_error=ratio(error, norm),
        modules={path: ratio(m.error, m.norm) for path, m in modules.items()},
        not_captured=not_captured,
        captured=1 - (error**2 + lost**2) / (norm**2 + lost**2),
    )


def _some(tensors: Tensors) -> str:
    return ", ".join(sorted(tensors)[:2]) or "empty"
