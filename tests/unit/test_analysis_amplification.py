"""The paper's Table 7 against dense SVDs."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from lorasmith.analysis import amplification
from lorasmith.errors import BaseMismatchError, ConfigError
from lorasmith.lora import Factors


def make(out: int = 40, inn: int = 30, rank: int = 4) -> tuple[torch.Tensor, Factors]:
    g = torch.Generator().manual_seed(0)
    W, B, A = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in ((out, inn), (out, rank), (rank, inn))
    )
    return W, Factors(A, B, 0.5)


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_every_entry_is_the_dense_one(rank):
    W, f = make()
    result = amplification(W, f, rank=rank)
    D = f.scaling * f.B @ f.A
    r = rank or 4
    U, _, Vh = torch.linalg.svd(D)
    expected = torch.linalg.matrix_norm(U[:, :r].T @ W @ Vh[:r].T).item()
    assert result.rank == r
    assert result.on_delta == pytest.approx(expected, rel=1e-10)
    assert result.factor == pytest.approx(D.norm().item() / expected, rel=1e-10)
    assert result.delta_norm == pytest.approx(D.norm().item(), rel=1e-12)
    assert result.weight_norm == pytest.approx(W.norm().item(), rel=1e-12)
    U, _, Vh = torch.linalg.svd(W)
    assert result.on_weight == pytest.approx((U[:, :r].T @ W @ Vh[:r].T).norm().item(), rel=1e-10)


def test_random_directions_see_what_chance_gives():
    W, f = make(200, 150, 8)
    values = [amplification(W, f, seed=s).on_random for s in range(8)]
    # E‖UᵀWV‖² = r²·‖W‖² / (out·in) for uniform frames; eight draws of 64 terms each.
    expected = 8 * W.norm().item() / (200 * 150) ** 0.5
    assert sum(v * v for v in values) / 8 == pytest.approx(expected**2, rel=0.2)
    assert values[0] == amplification(W, f, seed=0).on_random != values[1]


def test_a_delta_along_the_weight_is_not_amplified_beyond_its_size():
    W, _ = make()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    f = Factors(Vh[:4].clone(), U[:, :4] * S[:4], 3.0)
    result = amplification(W, f)
    assert result.on_delta == pytest.approx(result.on_weight, rel=1e-10)
    assert result.factor == pytest.approx(3.0, rel=1e-10)


def test_weights_stored_in_by_out():
    W, f = make()
    flipped, plain = amplification(W.T.contiguous(), f, transposed=True), amplification(W, f)
    assert astuple(flipped) == pytest.approx(astuple(plain), rel=1e-12)
    with pytest.raises(BaseMismatchError, match="transposed"):
        amplification(W.T, f)


def test_a_rank_beyond_the_delta_is_refused():
    W, f = make()
    for rank in (0, 5):
        with pytest.raises(ConfigError, match="use 1 to 4"):
            amplification(W, f, rank=rank)
