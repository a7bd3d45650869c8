"""Does the delta repeat what the base already does, or amplify what it does little of? (paper §7.3)"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.analysis.dense import frobenius_norm, top_svd
from lorasmith.analysis.lowrank import pair_norm, pair_svd, ratio, widen
from lorasmith.errors import BaseMismatchError, ConfigError
from lorasmith.lora import Factors


@dataclass(frozen=True, slots=True)
class Amplification:
    """One column pair of the paper's Table 7.

    Attributes:
        rank: how many directions, r.
        delta_norm: ‖ΔW‖_F.
        weight_norm: ‖W‖_F.
        on_delta: ‖Uᵀ·W·V‖_F with U, V the top r singular directions of ΔW.
        on_weight: the same with those of W: the most that r directions can hold.
        on_random: the same with random ones: what chance gives.
        factor: delta_norm / on_delta.
    """

    rank: int
    delta_norm: float
    weight_norm: float
    on_delta: float
    on_weight: float
    on_random: float
    factor: float


def amplification(
    weight: Tensor,
    factors: Factors,
    *,
    rank: int | None = None,
    seed: int = 0,
    transposed: bool = False,
) -> Amplification:
    """‖ΔW‖_F / ‖Uᵀ·W·V‖_F and what to compare it with.

    Args:
        weight: W, (out, in), or (in, out) when `transposed`.
        rank: r; by default that of the factors.
        seed: of the random directions.

    Raises:
        BaseMismatchError: W and ΔW differ in shape.
        ConfigError: r is not between 1 and the smaller of the factors' rank and W's sides.
    """
    W = (weight.T if transposed else weight).detach().cpu().double()
    if tuple(W.shape) != (factors.out_features, factors.in_features):
        raise BaseMismatchError(
            f"amplification: W is {tuple(W.shape)}, the delta ({factors.out_features}, "
            f"{factors.in_features}); pass transposed=True for weights stored (in, out)"
        )
    pair = widen(factors)
    U, S, Vh = pair_svd(pair)
    r = S.numel() if rank is None else rank
    if not 1 <= r <= S.numel():
        raise ConfigError(f"amplification: rank={rank}: use 1 to {S.numel()}, the rank of the delta")
    delta_norm, on_delta = pair_norm(pair), _projected(U[:, :r], W, Vh[:r].T)
    generator = torch.Generator().manual_seed(seed)
    return Amplification(
        rank=r,
        delta_norm=delta_norm,
        weight_norm=frobenius_norm(W),
        on_delta=on_delta,
        on_weight=torch.linalg.vector_norm(top_svd(W, r)[1]).item(),
        on_random=_projected(_frame(W.shape[0], r, generator), W, _frame(W.shape[1], r, generator)),
        factor=ratio(delta_norm, on_delta),
    )


def _projected(U: Tensor, W: Tensor, V: Tensor) -> float:
    return frobenius_norm(U.T @ W @ V)


def _frame(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """Singular directions of a Gaussian matrix are uniform over orthonormal frames; so is this Q."""
    Q: Tensor = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q
    return Q
