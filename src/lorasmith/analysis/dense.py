"""Leading singular directions of a matrix that is given in full."""

from __future__ import annotations

import torch
from torch import Tensor

from lorasmith.analysis.lowrank import SVD, balanced, kept_rank
from lorasmith.lora import Factors, compute_dtype

# The exact float64 SVD takes seconds up to here and minutes beyond.
EXACT_LIMIT = 2048
# Halko, Martinsson & Tropp (arXiv 0909.4061) use 5 to 10 and 1 to 2; flat spectra want more of both.
_OVERSAMPLING = 16
_POWER_ITERATIONS = 6


def top_svd(matrix: Tensor, rank: int, *, exact_limit: int = EXACT_LIMIT) -> SVD:
    """The leading `rank` singular triples, on the CPU.

    Exact in float64 up to a smaller side of `exact_limit`; beyond, randomised subspace iteration in
    float32 from a fixed seed, whose residual the caller states.
    """
    if _is_exact(matrix, rank, exact_limit):
        U, S, Vh = torch.linalg.svd(matrix.detach().cpu().double(), full_matrices=False)
    else:
        U, S, Vh = _randomised_svd(matrix.detach().cpu().to(compute_dtype(matrix.dtype)), rank)
    return U[:, :rank], S[:rank], Vh[:rank]


def _is_exact(matrix: Tensor, rank: int, exact_limit: int) -> bool:
    smaller = min(matrix.shape)
    return smaller <= exact_limit or 2 * (rank + _OVERSAMPLING) >= smaller


def _randomised_svd(matrix: Tensor, rank: int) -> SVD:
    generator = torch.Generator().manual_seed(0)
    width = rank + _OVERSAMPLING
    sketch = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
    Q = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(_POWER_ITERATIONS):
        Q = torch.linalg.qr(matrix.T @ Q).Q
        Q = torch.linalg.qr(matrix @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ U, S, Vh


def best_factors(
    matrix: Tensor,
    *,
    rank: int | None,
    energy: float | None = None,
    dtype: torch.dtype,
    exact_limit: int = EXACT_LIMIT,
) -> Factors:
    """The best approximation of `matrix` with the given rank, or the least that keeps `energy`."""
    if rank is not None:
        svd = top_svd(matrix, rank, exact_limit=exact_limit)
        return balanced(svd, rank, dtype=dtype, device=matrix.device)
    total = frobenius_norm(matrix) ** 2
    width = 64
    while True:
        if _is_exact(matrix, width, exact_limit):
            width = min(matrix.shape)
        svd = top_svd(matrix, width, exact_limit=exact_limit)
        enough = svd[1].double().square().sum().item() >= (energy or 0.0) * total
        if enough or width >= min(matrix.shape):
            kept = kept_rank(svd[1], rank=None, energy=energy, total_energy=total)
            return balanced(svd, kept, dtype=dtype, device=matrix.device)
        width *= 2


def residual_norm(matrix: Tensor, factors: Factors) -> float:
    """‖matrix − B @ A‖_F, measured on the factors as they are stored (scaling 1)."""
    wide = compute_dtype(matrix.dtype)
    A, B = factors.A.to(wide), factors.B.to(wide)
    return frobenius_norm(torch.addmm(matrix.to(wide), B, A, alpha=-1.0))


def frobenius_norm(matrix: Tensor) -> float:
    """‖matrix‖_F, accumulated in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64).item())
