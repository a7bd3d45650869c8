"""Truncation is Eckart–Young's optimum, and its config tells the truth."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.analysis import relative_error, spectrum, truncate
from lorasmith.analysis.configs import config_for
from lorasmith.errors import BaseMismatchError, ConfigError
from lorasmith.lora import Adapter, Factors, LoRAConfig
from tests.support.tolerance import close


def make_factors(
    out: int, inn: int, rank: int, *, seed: int = 0, dtype=torch.float32, scaling=1.5
) -> Factors:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, inn, generator=g, dtype=torch.float64)
    B = torch.randn(out, rank, generator=g, dtype=torch.float64)
    return Factors(A.to(dtype), B.to(dtype), scaling)


def dense(f: Factors) -> torch.Tensor:
    return f.scaling * (f.B.double() @ f.A.double())


def make_adapter(*, dtype=torch.float64, rank: int = 6, seed: int = 0) -> Adapter:
    shapes = {"layers.0.q": (20, 14), "layers.0.v": (9, 14), "layers.1.q": (20, 14)}
    factors = {
        p: make_factors(*s, rank, seed=seed + i, dtype=dtype) for i, (p, s) in enumerate(shapes.items())
    }
    return Adapter(LoRAConfig(rank=rank, alpha=1.5 * rank), factors, provenance={"made": "here"})


def config_agrees(adapter: Adapter) -> bool:
    return all(
        adapter.config.rank_of(p) == f.rank and adapter.config.scaling_of(p) == f.scaling == 1.0
        for p, f in adapter.factors.items()
    )


@given(
    out=st.integers(2, 24),
    inn=st.integers(2, 24),
    rank=st.integers(1, 8),
    kept=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_the_error_is_the_dense_tail(out, inn, rank, kept, seed):
    f = make_factors(out, inn, rank, seed=seed, dtype=torch.float64)
    small = truncate(Adapter(LoRAConfig(rank=rank), {"m": f}), rank=kept).factors["m"]
    tail = torch.linalg.svdvals(dense(f))[kept:]
    error = torch.linalg.matrix_norm(dense(f) - dense(small))
    close(error, torch.linalg.vector_norm(tail), torch.float64)
    assert small.rank == min(kept, rank, out, inn)


def test_factors_are_balanced_and_the_input_is_left_alone():
    adapter = make_adapter()
    before = adapter.digest
    small = truncate(adapter, rank=3)
    assert adapter.digest == before
    assert small.provenance == adapter.provenance
    for f in small.factors.values():
        close(f.A @ f.A.T, f.B.T @ f.B, torch.float64)
    assert config_agrees(small)
    assert small.config.rank == 3
    assert not small.config.rank_pattern


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_a_full_rank_truncation_is_lossless_to_it(dtype):
    adapter = make_adapter(dtype=dtype)
    same = truncate(adapter, rank=6)
    for path, f in same.factors.items():
        assert f.A.dtype == f.B.dtype == dtype
        close(dense(f) / 50, dense(adapter.factors[path]) / 50, dtype)


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95, 1.0])
def test_energy_keeps_the_least_rank_that_has_it(energy):
    adapter = make_adapter()
    small = truncate(adapter, energy=energy)
    assert config_agrees(small)
    for path, f in small.factors.items():
        share = torch.linalg.svdvals(dense(adapter.factors[path])) ** 2
        share = share.cumsum(0) / share.sum()
        assert share[f.rank - 1] >= energy - 1e-13
        assert f.rank == 1 or share[f.rank - 2] < energy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_planted_rank_comes_back_from_full_energy(dtype):
    f = make_factors(30, 20, 3, dtype=torch.float64)
    mix = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    planted = Factors((mix.T @ f.A).to(dtype), (f.B @ mix).to(dtype), 0.5)
    adapter = Adapter(LoRAConfig(rank=8), {"m": planted})
    # float32 factors of a rank-3 matrix have 1e-7 of rounding beside it, 1e-14 in energy.
    small = truncate(adapter, energy=1.0 if dtype == torch.float64 else 1 - 1e-12)
    assert small.factors["m"].rank == 3
    assert relative_error(adapter, small).overall < 1e-6


def test_energy_shares_per_module_need_patterns_by_whole_path():
    flat, spiked = make_factors(20, 20, 6, dtype=torch.float64), make_factors(20, 20, 6, dtype=torch.float64)
    spiked.B[:, 0] *= 1e4
    paths = ["q", "block.q", "a.block.q", "blockXq"]
    for odd in paths:
        adapter = Adapter(LoRAConfig(rank=6), {p: spiked if p == odd else flat for p in paths})
        small = truncate(adapter, energy=0.99)
        assert config_agrees(small)
        assert small.factors[odd].rank == 1


@given(ranks=st.lists(st.integers(1, 3), min_size=6, max_size=6))
def test_a_config_for_any_mixture_of_ranks_agrees_with_its_factors(ranks):
    paths = ["q", "x.q", "y.x.q", "yxq", "x+q", "z.x+q"]
    factors = {
        p: Factors(torch.zeros(r, 3), torch.zeros(2, r), 1.0) for p, r in zip(paths, ranks, strict=True)
    }
    config = config_for(LoRAConfig(rslora=True, rank_pattern={"q": 9}), factors)
    assert config_agrees(Adapter(config, factors))


def test_biases_travel():
    adapter = make_adapter()
    adapter.biases["layers.0.q"] = torch.ones(20)
    assert torch.equal(truncate(adapter, rank=2).biases["layers.0.q"], torch.ones(20))


def test_a_zero_delta_truncates_to_a_zero_delta():
    f = make_factors(6, 5, 3)
    f.B.zero_()
    small = truncate(Adapter(LoRAConfig(rank=3), {"m": f}), energy=0.5).factors["m"]
    assert small.rank == 1
    assert not (small.B @ small.A).any()
    assert spectrum(small).numerical_rank == 0


@pytest.mark.parametrize(
    "options", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"rank": True}, {"energy": 0.0}, {"energy": 1.5}]
)
def test_unusable_options_are_refused(options):
    with pytest.raises(ConfigError, match=r"truncate: "):
        truncate(make_adapter(), **options)


def test_relative_error_is_the_dense_one():
    a, b = make_adapter(seed=0), make_adapter(seed=7)
    result = relative_error(a, b)
    norms = {p: torch.linalg.matrix_norm(dense(f)).item() for p, f in a.factors.items()}
    gaps = {p: torch.linalg.matrix_norm(dense(f) - dense(b.factors[p])).item() for p, f in a.factors.items()}
    assert result.modules == pytest.approx({p: gaps[p] / norms[p] for p in gaps}, rel=1e-12)
    overall = math.hypot(*gaps.values()) / math.hypot(*norms.values())
    assert result.overall == pytest.approx(overall, rel=1e-12)
    assert relative_error(a, a).overall < 1e-14


def test_a_small_difference_keeps_its_digits():
    a = make_adapter(seed=0)
    b = make_adapter(seed=0)
    for f in b.factors.values():
        f.B *= 1 + 1e-10
    assert relative_error(a, b).overall == pytest.approx(1e-10, rel=1e-4)


def test_a_module_that_one_side_lacks_is_zero():
    a = make_adapter()
    b = Adapter(a.config, {"layers.0.q": a.factors["layers.0.q"], "extra": make_factors(4, 4, 2)})
    modules = relative_error(a, b).modules
    assert modules["layers.0.q"] < 1e-14
    assert modules["layers.0.v"] == 1.0
    assert modules["extra"] == math.inf


def test_shapes_that_differ_are_all_named():
    a, b = make_adapter(), make_adapter()
    b.factors["layers.0.q"] = make_factors(20, 13, 2)
    b.factors["layers.1.q"] = make_factors(21, 14, 2)
    with pytest.raises(BaseMismatchError, match=r"layers.0.q: 20x14 in a, 20x13 in b\n  layers.1.q"):
        relative_error(a, b)
