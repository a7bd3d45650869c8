"""How much of a delta is left once W0 + delta is rounded to what the weights are stored in."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.analysis.lowrank import require_finite
from lorasmith.analysis.storage import Storage, as_stored
from lorasmith.errors import BaseMismatchError, TargetError
from lorasmith.lora import Adapter, Factors, add_delta, delta, dora_weight


@dataclass(frozen=True, slots=True)
class Survival:
    """Of one delta; a zero delta survives whole.

    Attributes:
        kept: ⟨realised, Δ⟩ / ‖Δ‖²: 1 where the update is all there (more where rounding exaggerates it).
        relative_error: ‖realised − Δ‖ / ‖Δ‖, rounding noise included.
        delta_norm: ‖Δ‖_F.
    """

    kept: float
    relative_error: float
    delta_norm: float


@dataclass(frozen=True, slots=True)
class SurvivalReport:
    """By module path, and over all of them as one vector (so weighted by ‖Δ‖²)."""

    modules: dict[str, Survival]
    kept: float
    relative_error: float


def survival(
    weight: Tensor,
    factors: Factors,
    dtype: Storage,
    *,
    transposed: bool = False,
    magnitude: Tensor | None = None,
) -> Survival:
    """kept = ⟨realised, Δ⟩ / ‖Δ‖² with realised = dequant(quant(W0q + Δ)) − W0q.

    W0q is the base as stored in `dtype`, since that is the model the merge starts from; it equals W0
    where W0 already has that dtype. Forms the delta, and a few copies of W0 in float32.

    Args:
        weight: W0, (out, in), or (in, out) when `transposed`.
        dtype: a floating torch dtype, or `"fp32"`, `"bf16"`, `"fp16"`, `"int8"` (absmax per output
            channel), `"nf4"` (absmax per block of 64).
        magnitude: DoRA's; then delta is what DoRA adds to W0.

    Raises:
        BaseMismatchError: W0 and the delta differ in shape.
        ConfigError: the storage format is unknown.
    """
    if fault := _shape_fault(weight, factors, transposed):
        raise BaseMismatchError(f"survival: {fault}")
    channel_dim = 1 if transposed else 0
    stored = as_stored(weight.detach(), dtype, channel_dim=channel_dim)
    on_device = factors.to(stored.device)
    if magnitude is None:
        wanted = delta(on_device, dtype=stored.dtype)
        wanted = wanted.T if transposed else wanted
        merged = add_delta(stored, on_device, transposed=transposed)
    else:
        merged = dora_weight(stored, on_device, magnitude, transposed=transposed)
        wanted = merged - stored
    realised = as_stored(merged, dtype, channel_dim=channel_dim) - stored
    return _measure(_dot(realised, wanted), _dot(wanted, wanted), _dot(realised - wanted, realised - wanted))


def survival_report(
    weights: Mapping[str, Tensor] | Callable[[str], Tensor],
    adapter: Adapter,
    dtype: Storage,
    *,
    transposed: Collection[str] = (),
) -> SurvivalReport:
    """`survival` of every module; one weight is asked for at a time.

    Args:
        weights: module path → W0, as a map or a function.
        transposed: paths of modules whose weight is stored (in, out).

    Raises:
        TargetError: `weights` is a map that lacks modules of the adapter.
        BaseMismatchError: shapes differ.
        ConfigError: the storage format is unknown, or factors hold NaN or infinity.
    """
    require_finite("survival_report", {"": adapter})
    if isinstance(weights, Mapping):
        _require_all(weights, adapter)
        get: Callable[[str], Tensor] = weights.__getitem__
    else:
        get = weights
    modules, faults = {}, []
    for path, factors in adapter.factors.items():
        weight, is_transposed = get(path), path in transposed
        if fault := _shape_fault(weight, factors, is_transposed):
            faults.append(f"{path}: {fault}")
        elif not faults:
            modules[path] = survival(
                weight,
                factors,
                dtype,
                transposed=is_transposed,
                magnitude=adapter.extras.magnitudes.get(path),
            )
    if faults:
        raise BaseMismatchError("survival_report: the adapter is for another base:\n  " + "\n  ".join(faults))
    overall = _overall(modules.values())
    return SurvivalReport(modules, overall.kept, overall.relative_error)


def _overall(parts: Iterable[Survival]) -> Survival:
    energies = [(s, s.delta_norm**2) for s in parts]
    return _measure(
        sum(s.kept * e for s, e in energies),
        sum(e for _, e in energies),
        sum(s.relative_error**2 * e for s, e in energies),
    )


def _measure(kept: float, energy: float, error: float) -> Survival:
    if energy == 0:
        return Survival(1.0, 0.0, 0.0)
    return Survival(kept / energy, math.sqrt(error / energy), math.sqrt(energy))


def _dot(x: Tensor, y: Tensor) -> float:
    return (x * y).sum(dtype=torch.float64).item()


def _shape_fault(weight: Tensor, factors: Factors, transposed: bool) -> str:
    shape = (factors.out_features, factors.in_features)
    if tuple(weight.shape) == (shape[::-1] if transposed else shape):
        return ""
    layout = "stored (in, out)" if transposed else "stored (out, in)"
    return f"W0 is {tuple(weight.shape)}, {layout}; the delta is {shape}, (out, in)"


def _require_all(weights: Mapping[str, Tensor], adapter: Adapter) -> None:
    missing = [path for path in adapter.factors if path not in weights]
    if missing:
        raise TargetError(
            f"survival_report: no weight for {len(missing)} of {len(adapter.factors)} modules: "
            + ", ".join(missing[:5])
            + "; pass module path → weight"
        )
