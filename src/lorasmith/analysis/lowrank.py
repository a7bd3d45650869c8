"""Arithmetic of low-rank matrices through their factors, in float64 on the CPU.

Nothing here is (out, in): the work is O((out + in)·r²), so float64 is cheap, and it leaves errors
far below the rounding of the stored factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorasmith.errors import ConfigError
from lorasmith.lora import Adapter, Factors, compute_dtype

Pair = tuple[Tensor, Tensor]  # scaling · B (out, r) and A (r, in), both float64
SVD = tuple[Tensor, Tensor, Tensor]  # U (out, k), S (k,), Vh (k, in)

# Share of the energy that is rounding: a relative error of 1e-7, float32's own.
_ENERGY_NOISE = 1e-14
# Stacked float64 factors that cancel exactly leave a few units in the last place of the largest input.
CANCELLATION_NOISE = 64 * torch.finfo(torch.float64).eps


def widen(factors: Factors) -> Pair:
    """scaling · B and A, in float64 on the CPU."""
    sB = factors.B.detach().cpu().double() * factors.scaling
    return sB, factors.A.detach().cpu().double()


def stack(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Σ wᵢ·Δᵢ, exactly and without cross terms: [w₁B₁ w₂B₂ …] @ [A₁; A₂; …]."""
    sB = torch.cat([w * sB for w, (sB, _) in zip(weights, pairs, strict=True)], dim=1)
    return sB, torch.cat([A for _, A in pairs], dim=0)


def pair_svd(pair: Pair) -> SVD:
    """Reduced SVD of sB @ A: QR(sB) = Q_B·R_B, QR(Aᵀ) = Q_A·R_A, then the SVD of R_B·R_Aᵀ."""
    sB, A = pair
    QB, RB = torch.linalg.qr(sB)
    QA, RA = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(RB @ RA.T, full_matrices=False)
    return QB @ U, S, Vh @ QA.T


def pair_norm(pair: Pair) -> float:
    """‖sB @ A‖_F. Through QR, so a difference of near-equal matrices keeps its digits."""
    sB, A = pair
    RB = torch.linalg.qr(sB, mode="r").R
    RA = torch.linalg.qr(A.T, mode="r").R
    return float(torch.linalg.matrix_norm(RB @ RA.T).item())


def difference_norm(a: Pair, b: Pair) -> float:
    """‖Δa − Δb‖_F."""
    return pair_norm(stack([a, b], [1.0, -1.0]))


def inner(a: Pair, b: Pair) -> float:
    """⟨Δa, Δb⟩ = Σ (sB_aᵀ·sB_b) ∘ (A_a·A_bᵀ), of two (r_a, r_b) matrices."""
    return ((a[0].T @ b[0]) * (a[1] @ b[1].T)).sum().item()


def ratio(error: float, norm: float) -> float:
    """error / norm, where nothing over nothing is 0 and something over nothing is infinite."""
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return error / norm


def norm(pair: Pair) -> float:
    """‖sB @ A‖_F by the inner product: for the size of one delta, cheaper than `pair_norm`."""
    return math.sqrt(max(inner(pair, pair), 0.0))


def numerical_rank(S: Tensor, dtype: torch.dtype, *, noise: float = 0.0) -> int:
    """How many of the descending singular values are more than rounding.

    Args:
        dtype: of the stored factors. What lies below its eps (at least float32's), relative to the
            largest value, is no larger than the rounding of the factors themselves.
        noise: an absolute floor: what cancellation in a sum leaves.
    """
    if S.numel() == 0:
        return 0
    tolerance = max(torch.finfo(compute_dtype(dtype)).eps * S[0].item(), noise)
    return int(S.gt(tolerance).sum().item())


def kept_rank(S: Tensor, *, rank: int | None, energy: float | None, total_energy: float | None = None) -> int:
    """At least 1: `rank`, or the least k with Σ_{i≤k} σᵢ² ≥ energy · total (to 1e-14)."""
    if rank is not None:
        return min(rank, S.numel())
    cumulative = S.double().square().cumsum(0)
    total = cumulative[-1].item() if total_energy is None else total_energy
    wanted = total * ((energy or 0.0) - _ENERGY_NOISE)
    return min(int((cumulative < wanted).sum().item()) + 1, S.numel())


def balanced(svd: SVD, rank: int, *, dtype: torch.dtype, device: torch.device) -> Factors:
    """The leading `rank` terms as B = U·√S, A = √S·Vh with scaling 1."""
    U, S, Vh = svd
    root = S[:rank].sqrt()
    A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
    return Factors(A.to(device, dtype), B.to(device, dtype), 1.0)


def dtype_of(factors: Factors) -> torch.dtype:
    """The dtype that results for `factors` come back in."""
    return torch.promote_types(factors.A.dtype, factors.B.dtype)


def require_one_cut(verb: str, rank: int | None, energy: float | None) -> None:
    """Refuse anything but exactly one usable `rank` or `energy`.

    Raises:
        ConfigError: naming what was given.
    """
    if (rank is None) == (energy is None):
        raise ConfigError(f"{verb}: rank={rank!r}, energy={energy!r}: give exactly one of the two")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"{verb}: rank={rank!r}: use a whole number of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"{verb}: energy={energy!r}: use a share above 0 and up to 1, such as 0.99")


def require_deltas(verb: str, adapter: Adapter) -> None:
    """Raise unless scaling · B @ A is all that `adapter` does to the weight of each module.

    Raises:
        ConfigError: DoRA's magnitudes, or biases inside the factors, which scale with them.
    """
    if adapter.extras.magnitudes or adapter.extras.shifts:
        raise ConfigError(
            f"{verb}: the adapter holds {adapter.extras}, so B @ A is not its whole update.\n"
            "  Convert DoRA to plain LoRA first: dora_to_lora(adapter, weights, rank=…)."
        )


def require_finite(verb: str, adapters: Mapping[str, Adapter]) -> None:
    """Refuse NaN and infinity before any decomposition.

    Raises:
        ConfigError: with every module that holds one.
    """
    bad = [
        f"{name}{path}"
        for name, adapter in adapters.items()
        for path, f in adapter.factors.items()
        if not (f.A.isfinite().all() and f.B.isfinite().all() and math.isfinite(f.scaling))
    ]
    if bad:
        lines = "\n  ".join(bad[:20]) + ("\n  …" if len(bad) > 20 else "")
        raise ConfigError(
            f"{verb}: {len(bad)} module(s) hold NaN or infinity, so the adapter is damaged or its "
            f"training diverged; go back to an earlier checkpoint:\n  {lines}"
        )
