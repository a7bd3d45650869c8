"""Singular values through the factors against the dense SVD of delta."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.analysis import singular_values, spectra, spectrum, svd
from lorasmith.errors import ConfigError
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


@given(out=st.integers(1, 20), inn=st.integers(1, 20), rank=st.integers(1, 8), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_svd_is_the_dense_one(out, inn, rank, seed):
    f = make_factors(out, inn, rank, seed=seed, dtype=torch.float64)
    U, S, Vh = svd(f)
    k = min(out, inn, rank)
    assert (U.shape, S.shape, Vh.shape) == ((out, k), (k,), (k, inn))
    close(S, torch.linalg.svdvals(dense(f))[:k], torch.float64)
    close(U * S @ Vh, dense(f), torch.float64)
    close(U.T @ U, torch.eye(k), torch.float64)
    close(Vh @ Vh.T, torch.eye(k), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_come_back_in_the_input_dtype(dtype):
    f = make_factors(12, 9, 4, dtype=dtype)
    assert {t.dtype for t in svd(f)} == {dtype}
    s = spectrum(f)
    assert s.singular_values.dtype == s.energy.dtype == dtype
    close(s.singular_values, torch.linalg.svdvals(dense(f))[:4], dtype)


def test_float32_factors_give_float64_accurate_values():
    f = make_factors(40, 30, 6)
    close(svd(f)[1], torch.linalg.svdvals(dense(f))[:6].float(), torch.float32)
    assert abs(spectrum(f).frobenius_norm / torch.linalg.matrix_norm(dense(f)).item() - 1) < 1e-13


def test_effective_rank_of_a_flat_spectrum_is_its_length():
    Q = torch.linalg.qr(make_factors(16, 16, 16, dtype=torch.float64).B).Q
    s = spectrum(Factors(Q[:5], Q[:, :5].clone(), 3.0))
    assert s.effective_rank == pytest.approx(5, rel=1e-12)
    close(s.energy, torch.arange(1, 6).double() / 5, torch.float64)
    assert (s.rank, s.numerical_rank) == (5, 5)


def test_effective_rank_by_its_definition():
    f = make_factors(14, 11, 5, dtype=torch.float64)
    p = torch.linalg.svdvals(dense(f))[:5] ** 2
    p = (p / p.sum()).tolist()
    assert spectrum(f).effective_rank == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("planted", [1, 3, 7])
def test_planted_rank_is_found(planted, dtype):
    f = make_factors(30, 20, planted, dtype=torch.float64)
    mix = torch.randn(planted, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wide = Factors((mix.T @ f.A).to(dtype), (f.B @ mix).to(dtype), 0.5)
    s = spectrum(wide)
    assert (s.rank, s.numerical_rank) == (8, planted)


def test_a_zero_delta_has_rank_zero():
    f = make_factors(6, 5, 2)
    f.B.zero_()
    s = spectrum(f)
    assert (s.rank, s.numerical_rank, s.effective_rank, s.frobenius_norm) == (2, 0, 0.0, 0.0)
    assert not s.energy.any()


def test_every_module_of_an_adapter():
    factors = {f"m.{i}": make_factors(8 + i, 7, 3, seed=i) for i in range(3)}
    adapter = Adapter(LoRAConfig(rank=3), factors)
    before = adapter.digest
    values, whole = singular_values(adapter), spectra(adapter)
    assert list(values) == list(whole) == list(factors)
    for path, f in factors.items():
        close(values[path], torch.linalg.svdvals(dense(f))[:3], torch.float32)
    assert adapter.digest == before


def test_damaged_factors_are_named():
    adapter = Adapter(LoRAConfig(rank=2), {"a": make_factors(4, 4, 2), "b": make_factors(4, 4, 2)})
    adapter.factors["b"].A[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"1 module.*NaN(?s:.*)\bb$"):
        singular_values(adapter)
