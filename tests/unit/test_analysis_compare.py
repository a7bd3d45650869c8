"""Overlap and similarity of deltas against dense SVDs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.analysis import compare, cosine, overlap_grid, subspace_overlap
from lorasmith.errors import BaseMismatchError, ConfigError, TargetError
from lorasmith.lora import Adapter, Factors, LoRAConfig
from tests.support.tolerance import close


def make_adapter(seed: int, *, rank: int = 4, out: int = 20, inn: int = 15, dtype=torch.float64) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, inn, generator=g, dtype=torch.float64)
    B = torch.randn(out, rank, generator=g, dtype=torch.float64)
    return Adapter(LoRAConfig(rank=rank), {"m": Factors(A.to(dtype), B.to(dtype), 1.5)})


def dense(adapter: Adapter) -> torch.Tensor:
    f = adapter.factors["m"]
    return f.scaling * (f.B.double() @ f.A.double())


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_grid_is_phi_of_the_dense_singular_vectors(side):
    a, b = make_adapter(0, rank=4), make_adapter(1, rank=6)
    grid = overlap_grid(a, b, "m", side=side)
    assert grid.shape == (4, 6)
    bases = []
    for adapter in (a, b):
        U, _, Vh = torch.linalg.svd(dense(adapter), full_matrices=False)
        bases.append(U if side == "left" else Vh.T)
    for i in range(1, 5):
        for j in range(1, 7):
            phi = torch.linalg.matrix_norm(bases[0][:, :i].T @ bases[1][:, :j]) ** 2 / min(i, j)
            close(grid[i - 1, j - 1], phi, torch.float64)
            assert subspace_overlap(*bases, i, j) == pytest.approx(phi.item(), abs=1e-12)


@given(n=st.integers(2, 12), i=st.integers(1, 6), j=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_phi_lies_between_zero_and_one_and_is_one_for_nested_spans(n, i, j, seed):
    i, j = min(i, n), min(j, n)
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q for _ in "UV")
    assert -1e-12 <= subspace_overlap(U, V, i, j) <= 1 + 1e-12
    assert subspace_overlap(U, U, i, j) == pytest.approx(1, abs=1e-12)
    assert subspace_overlap(U[:, :i], U[:, i:], i, 1) < 1e-20 if i < n else True


def test_random_subspaces_overlap_by_chance_only():
    # E φ = max(i, j) / n for uniform spans.
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(400, 8, generator=g, dtype=torch.float64)).Q for _ in "UV")
    assert subspace_overlap(U, V, 8, 8) == pytest.approx(8 / 400, abs=0.01)


def test_directions_that_are_rounding_take_no_part():
    a, b = make_adapter(0, rank=4), make_adapter(1, rank=4)
    a.factors["m"].B[:, 2:] = 0
    assert overlap_grid(a, b, "m").shape == (2, 4)
    a.factors["m"].B.zero_()
    assert overlap_grid(a, b, "m").shape == (0, 4)


def test_compare_is_the_dense_comparison():
    a, b = make_adapter(0), make_adapter(1, rank=7)
    c = compare(a, b)["m"]
    Da, Db = dense(a), dense(b)
    na, nb = Da.norm().item(), Db.norm().item()
    assert c.norm_a == pytest.approx(na, rel=1e-12)
    assert c.norm_b == pytest.approx(nb, rel=1e-12)
    assert c.cosine == pytest.approx((Da * Db).sum().item() / (na * nb), abs=1e-12)
    assert c.relative_difference == pytest.approx((Da - Db).norm().item() / na, rel=1e-12)
    va, vb = (torch.linalg.svd(D).Vh[0] for D in (Da, Db))
    assert c.top_overlap == pytest.approx((va @ vb).item() ** 2, abs=1e-12)


def test_the_same_and_the_opposite():
    a = make_adapter(0)
    b = Adapter(a.config, {"m": a.factors["m"].clone()})
    b.factors["m"].scaling *= -2
    same, opposite = compare(a, a)["m"], compare(a, b)["m"]
    assert same.cosine == pytest.approx(1, abs=1e-12)
    assert same.relative_difference < 1e-14
    assert opposite.cosine == pytest.approx(-1, abs=1e-12)
    assert opposite.relative_difference == pytest.approx(3, rel=1e-12)
    assert opposite.top_overlap == pytest.approx(1, abs=1e-12)


def test_a_module_of_one_side_only():
    a, b = make_adapter(0), make_adapter(1)
    b.factors["n"] = b.factors.pop("m")
    result = compare(a, b)
    assert (result["m"].norm_b, result["m"].relative_difference, result["m"].cosine) == (0.0, 1.0, None)
    assert (result["n"].norm_a, result["n"].relative_difference) == (0.0, math.inf)


def test_faults_are_named():
    a, b = make_adapter(0), make_adapter(1, inn=16)
    with pytest.raises(BaseMismatchError, match="m: 20x15"):
        compare(a, b)
    with pytest.raises(BaseMismatchError):
        overlap_grid(a, b, "m")
    with pytest.raises(TargetError, match="no factors at 'x'"):
        overlap_grid(a, a, "x")
    with pytest.raises(ConfigError, match="i=5"):
        subspace_overlap(torch.eye(4), torch.eye(4), 5, 1)
    b = make_adapter(1)
    b.factors["m"].A[0, 0] = math.inf
    for call in (lambda: compare(a, b), lambda: overlap_grid(a, b, "m")):
        with pytest.raises(ConfigError, match="b m"):
            call()


def test_cosine_is_that_of_all_modules_as_one_vector():
    a, b = make_adapter(0), make_adapter(1, rank=2)
    extra = make_adapter(2)
    b.factors["only here"] = extra.factors["m"]
    x = torch.cat([dense(a).flatten(), torch.zeros(300, dtype=torch.float64)])
    y = torch.cat([dense(b).flatten(), dense(extra).flatten()])
    assert cosine(a, b) == pytest.approx(torch.nn.functional.cosine_similarity(x, y, dim=0).item(), abs=1e-14)
    assert cosine(a, a) == pytest.approx(1, abs=1e-14)
    a.factors["m"].B.zero_()
    assert cosine(a, b) is None
