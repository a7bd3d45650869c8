"""What a delta is made of: its singular values, without forming it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.analysis.lowrank import SVD, dtype_of, numerical_rank, pair_svd, require_finite, widen
from lorasmith.lora import Adapter, Factors


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values σ of one module's delta, and what they say.

    Attributes:
        singular_values: descending, (k,) with k = min(rank, out, in).
        rank: inner dimension of the factors, what the adapter pays for.
        numerical_rank: how many values exceed the rounding of the factors, what it uses.
        effective_rank: exp(H(σ²/Σσ²)), H the entropy in nats: k for a flat spectrum; 0 for a zero delta.
        energy: Σ_{i≤j} σᵢ² / Σσ² for j = 1 … k; zeros for a zero delta.
        frobenius_norm: ‖delta‖_F.
    """

    singular_values: Tensor
    rank: int
    numerical_rank: int
    effective_rank: float
    energy: Tensor
    frobenius_norm: float


def svd(factors: Factors) -> SVD:
    """U, S, Vh with scaling · B @ A = U · diag(S) · Vh, in the factors' dtype and on their device.

    QR(scaling·B) = Q_B·R_B and QR(Aᵀ) = Q_A·R_A in float64, then the SVD of the (r, r) R_B·R_Aᵀ.

    Returns:
        U (out, k), S (k,) descending and Vh (k, in), with k = min(rank, out, in).
    """
    U, S, Vh = pair_svd(widen(factors))
    dtype, device = dtype_of(factors), factors.A.device
    return U.to(device, dtype), S.to(device, dtype), Vh.to(device, dtype)


def spectrum(factors: Factors) -> Spectrum:
    """The spectrum of one module's delta."""
    S = pair_svd(widen(factors))[1]
    dtype, device = dtype_of(factors), factors.A.device
    total = S.square().sum()
    shares = S.square() / total if total > 0 else torch.zeros_like(S)
    return Spectrum(
        singular_values=S.to(device, dtype),
        rank=factors.rank,
        numerical_rank=numerical_rank(S, dtype),
        effective_rank=torch.special.entr(shares).sum().exp().item() if total > 0 else 0.0,
        energy=shares.cumsum(0).to(device, dtype),
        frobenius_norm=total.sqrt().item(),
    )


def spectra(adapter: Adapter) -> dict[str, Spectrum]:
    """Module path → `Spectrum`.

    Raises:
        ConfigError: factors hold NaN or infinity.
    """
    require_finite("spectra", {"": adapter})
    return {path: spectrum(factors) for path, factors in adapter.factors.items()}


def singular_values(adapter: Adapter) -> dict[str, Tensor]:
    """Module path → the singular values of its delta, descending.

    Raises:
        ConfigError: factors hold NaN or infinity.
    """
    require_finite("singular_values", {"": adapter})
    return {path: svd(factors)[1] for path, factors in adapter.factors.items()}
