"""Planted problems give back what was planted: rank, dimension, capacity, learning rate."""

from __future__ import annotations

import math

import pytest
import torch

from lorasmith.analysis import Projection, capacity, intrinsic_dimension, rate_range, truncation_curve
from lorasmith.errors import ConfigError
from lorasmith.lora import Adapter, Factors, LoRAConfig


def planted_adapter(rank: int, *, held_in: int = 16, seed: int = 0) -> Adapter:
    """Factors of inner size `held_in` whose delta has `rank` equal singular values."""
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for path in ("a", "b"):
        U = torch.linalg.qr(torch.randn(24, rank, generator=g, dtype=torch.float64)).Q
        V = torch.linalg.qr(torch.randn(20, rank, generator=g, dtype=torch.float64)).Q
        mix = torch.randn(rank, held_in, generator=g, dtype=torch.float64)
        A, B = torch.linalg.pinv(mix) @ V.T, U @ mix
        factors[path] = Factors(A, B, 1.0)
    return Adapter(LoRAConfig(rank=held_in, alpha=held_in), factors)


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16])
def test_a_planted_rank_is_r99(rank):
    adapter = planted_adapter(rank)
    target = {path: f.scaling * f.B @ f.A for path, f in adapter.factors.items()}

    def loss(of: Adapter) -> float:
        return sum(float((f.scaling * f.B @ f.A - target[p]).square().sum()) for p, f in of.factors.items())

    base = sum(float(t.square().sum()) for t in target.values())
    curve = truncation_curve(adapter, loss, base_loss=base)
    assert curve.r99 == rank
    assert curve.r90 == rank  # equal singular values: half the rank keeps half the gain
    assert curve.kept(16) == pytest.approx(1)
    if rank > 1:
        assert curve.kept(rank // 2) == pytest.approx(0.5, abs=0.01)


def test_an_adapter_that_gained_nothing_has_no_rank():
    curve = truncation_curve(planted_adapter(2), lambda _: 3.0, base_loss=2.0)
    assert curve.r90 is None
    assert curve.r99 is None


@pytest.mark.parametrize("planted", [4, 16, 64])
def test_a_planted_dimension_is_d90(planted):
    """k equations in D unknowns: a random subspace solves them exactly from d = k on (Li et al., section 2)."""
    shapes = {"x.A": torch.Size([8, 20]), "x.B": torch.Size([30, 8])}
    total = sum(s.numel() for s in shapes.values())
    g = torch.Generator().manual_seed(1)
    M = torch.linalg.qr(torch.randn(total, planted, generator=g)).Q.T
    y = torch.randn(planted, generator=g)

    def run(d: int, seed: int) -> float:
        projection = Projection(shapes, d, seed=seed)
        columns = []
        for j in range(d):  # P, column by column, through the code that is tested
            projection.theta = torch.zeros(d).index_fill_(0, torch.tensor([j]), 1.0)
            columns.append(torch.cat([t.reshape(-1) for t in projection.expand().values()]))
        MP = M @ torch.stack(columns, 1)
        theta = torch.linalg.lstsq(MP.double(), y.double()[:, None], driver="gelsd").solution
        return float((MP.double() @ theta - y.double()[:, None]).square().sum())

    found = intrinsic_dimension(
        run, base_loss=float(y.square().sum()), target_loss=0.0, dimensions=[1 << k for k in range(9)]
    )
    assert found.d90 == planted
    assert all(len(gains) == 3 for gains in found.gains.values())


def test_pulling_back_is_the_gradient_of_expanding():
    shapes = {"x.A": torch.Size([3, 5]), "x.B": torch.Size([4, 3])}
    p = Projection(shapes, 6, seed=0)
    g = torch.Generator().manual_seed(0)
    p.theta, p.scales = torch.randn(6, generator=g), torch.randn(2, generator=g)
    gradients = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    of_theta, of_scales = p.pull_back(gradients)
    p.theta.requires_grad_(True)
    p.scales.requires_grad_(True)
    sum((gradients[name] * t).sum() for name, t in p.expand().items()).backward()
    torch.testing.assert_close(of_theta, p.theta.grad)
    torch.testing.assert_close(of_scales, p.scales.grad)


def test_the_columns_of_the_projection_are_orthonormal():
    p = Projection({"x": torch.Size([40])}, 7, seed=3)
    columns = []
    for j in range(7):
        p.theta = torch.eye(7)[j]
        columns.append(p.expand()["x"])
    P = torch.stack(columns, 1)
    torch.testing.assert_close(P.T @ P, torch.eye(7))


def test_no_dimension_is_enough_or_there_is_nothing_to_reach():
    found = intrinsic_dimension(lambda d, s: 1.0, base_loss=1.0, target_loss=0.0, dimensions=[1, 2, 4])
    assert found.d90 is None
    with pytest.raises(ConfigError, match="no gain"):
        intrinsic_dimension(lambda d, s: 1.0, base_loss=1.0, target_loss=1.0, dimensions=[1])


def test_capacity_is_bits_over_what_a_rank_holds():
    # 131,000 tokens at 2 bits each over SmolLM2-135M's 305,280 parameters per unit of rank
    found = capacity(131_000 * 2 * math.log(2), 305_280)
    assert found.exact_rank == pytest.approx(131_000 * 2 / (2 * 305_280))
    assert found.rank == 1
    assert capacity(10 * 2 * 305_280 * math.log(2) * 1.01, 305_280).rank == 11
    assert "262,000 bits / (2 bits · 305,280 parameters" in str(found)


def test_a_range_test_finds_the_planted_rate():
    """Gradient descent on x²/2: |1 − rate| shrinks up to rate 1 and grows beyond 2."""
    rates = [1e-3 * 1.12**k for k in range(80)]
    x, losses = 1.0, []
    for rate in rates:
        losses.append(x * x / 2 + 1e-3)
        x *= 1 - rate
        x = max(x, 1e-2) if abs(x) < 1e-2 else x
    found = rate_range(rates, losses)
    assert 0.2 < found.suggested < 1.0
    assert found.diverged_at is None or found.diverged_at > 2
    with pytest.raises(ConfigError, match="rose from the first step"):
        rate_range(rates[:9], [float(k) for k in range(1, 10)])
    with pytest.raises(ConfigError, match="at least five"):
        rate_range([1.0], [1.0])
