"""The C functions of a decode step against the same in plain torch, and against any company."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorasmith.engine import native
from lorasmith.engine.native_llama import DecodeOps, Positions
from tests.support.tolerance import close

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler on this machine")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("width", [7, 64, 130])
def test_add_norm_is_the_residual_and_its_norm(rows, width):
    ops = DecodeOps(1, 1, width, 1.0, 1e-5)
    x, more, weight = randn(rows, width), randn(rows, width, seed=1), randn(width, seed=2)
    total = x + more
    got = ops.add_norm(x, more, weight)
    assert torch.equal(x, total)
    close(got, F.rms_norm(total, (width,), weight, 1e-5), torch.bfloat16)
    close(ops.add_norm(x, None, weight), got, torch.bfloat16)


def test_silu_mul_also_far_from_zero():
    both = torch.cat((torch.linspace(-200, 200, 801), torch.ones(801))).bfloat16()[None]
    got = DecodeOps(1, 1, 2, 1.0, 0.0).silu_mul(both)
    close(got, F.silu(both[:, :801]), torch.bfloat16)
    both[0, 0] = torch.nan
    assert DecodeOps(1, 1, 2, 1.0, 0.0).silu_mul(both)[0, 0].isnan()


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    other = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + other * sin


@pytest.mark.parametrize(("heads", "kv", "width"), [(9, 3, 64), (4, 4, 8), (8, 1, 128), (6, 2, 80)])
@pytest.mark.parametrize("has_norms", [False, True])
def test_attend_is_rope_then_attention_over_each_rows_own_span(heads, kv, width, has_norms):
    norms = (randn(width, seed=8), randn(width, seed=9)) if has_norms else (None, None)
    ops = DecodeOps(heads, kv, width, width**-0.5, 1e-6)
    layer = ops.attention_of(*norms)
    starts, rows = torch.tensor([0, 37, 5]), torch.tensor([2, 0, 3])
    keys, values = randn(4, 48, kv, width, seed=1), randn(4, 48, kv, width, seed=2)
    angle = torch.rand(3, width // 2, generator=torch.Generator().manual_seed(3)).repeat(1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    qkv = randn(3, (heads + 2 * kv) * width, seed=4)
    at = Positions(rows, starts, cos, sin, 37)
    before = keys.clone()
    got = ops.attend(qkv, layer, keys, values, at)
    q, k, v = qkv.double().view(3, -1, width).split((heads, kv, kv), dim=1)
    if norms[0] is not None and norms[1] is not None:
        q = F.rms_norm(q, (width,), norms[0].double(), 1e-6)
        k = F.rms_norm(k, (width,), norms[1].double(), 1e-6)
    q, k = (turned(t, cos.double()[:, None], sin.double()[:, None]) for t in (q, k))
    for i, (row, start) in enumerate(zip(rows.tolist(), starts.tolist(), strict=True)):
        close(keys[row, start], k[i], torch.bfloat16)
        assert torch.equal(values[row, start], v[i].bfloat16())
        K = keys[row, : start + 1].double().repeat_interleave(heads // kv, dim=1).transpose(0, 1)
        V = values[row, : start + 1].double().repeat_interleave(heads // kv, dim=1).transpose(0, 1)
        expected = F.scaled_dot_product_attention(q[i][:, None], K, V)
        close(got[i], expected.reshape(-1), torch.bfloat16)
        before[row, start] = keys[row, start]
    assert torch.equal(before, keys), "only the new positions may change"


def test_a_row_has_the_same_bits_in_any_company_and_with_any_number_of_threads():
    ops = DecodeOps(6, 2, 64, 0.125, 1e-6)
    layer = ops.attention_of(None, None)
    qkv, cos, sin = randn(5, 10 * 64), randn(5, 64, seed=1), randn(5, 64, seed=2)
    starts = torch.tensor([3, 60, 9, 0, 31])

    def run(rows: list[int]) -> torch.Tensor:
        keys, values = randn(5, 64, 2, 64, seed=3), randn(5, 64, 2, 64, seed=4)
        at = Positions(torch.tensor(rows), starts[rows], cos[rows], sin[rows], int(starts[rows].max()))
        return ops.attend(qkv[rows], layer, keys, values, at)

    together, threads = run([0, 1, 2, 3, 4]), torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            for rows in ([0], [3], [4, 1], [2, 0, 3]):
                assert torch.equal(run(rows), together[rows])
    finally:
        torch.set_num_threads(threads)
