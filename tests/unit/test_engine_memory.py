"""Second copies: which kernel computes, what memory is given back, and that no bit is lost with it."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorasmith.engine import Engine, Request, kernels
from lorasmith.engine.kernels import LinearGroup, calibrate, can_pack
from lorasmith.engine.pages import give_back
from tests.support.engines import engine_of, mixed_adapters, tiny_base
from tests.support.tolerance import close

needs_packing = pytest.mark.skipif(
    not can_pack(torch.eye(32).bfloat16()), reason="this torch packs no weights"
)


@needs_packing
def test_the_faster_kernel_is_chosen_by_rows_and_both_compute_the_same(monkeypatch):
    monkeypatch.setattr(kernels, "_plain_from", {})
    torch.manual_seed(0)
    group = LinearGroup([nn.Linear(64, 32, bias=True).bfloat16(), nn.Linear(64, 48).bfloat16()], pack=True)
    x = torch.randn(300, 64).bfloat16()
    close(group(x), group.plain(x), torch.bfloat16)
    for faster, expected in ((LinearGroup.plain, 16), (LinearGroup.__call__, None)):
        kernels._plain_from.clear()
        monkeypatch.setattr(kernels, "_seconds", lambda call, groups, x, f=faster: 1.0 if call is f else 2.0)
        calibrate([group])
        assert group.plain_from == expected
    group.plain_from = 100
    assert torch.equal(group(x), group.plain(x))
    group.packed = None
    assert torch.equal(group(x[:9]), group.plain(x[:9]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux gives pages back")
def test_pages_of_a_file_are_given_back_and_come_again_even_when_some_were_written(tmp_path):
    size = 8 << 20
    save_file({"w": torch.arange(size, dtype=torch.float32)}, tmp_path / "w.safetensors")
    weight = load_file(tmp_path / "w.safetensors")["w"]
    expected = torch.arange(size, dtype=torch.float32)
    assert torch.equal(weight, expected)
    weight[1000:2000] = -1  # copied on write: the file no longer holds it
    expected[1000:2000] = -1
    before = psutil.Process().memory_info().rss
    give_back([weight])
    given = before - psutil.Process().memory_info().rss
    assert torch.equal(weight, expected)
    if given < weight.numel() * 3:
        pytest.skip("this kernel keeps the pages")


def test_memory_is_counted_by_purpose():
    base = tiny_base(dtype=torch.bfloat16)
    adapters = mixed_adapters(base.model)
    engine = engine_of(base, adapters, max_rows=4)
    engine.generate([Request([1] * 70, adapter=name, max_tokens=2) for name in adapters])
    found = engine.memory()
    assert found["base"] == sum(p.numel() for p in base.model.parameters()) * 2
    assert found["adapters"] == sum(a.num_bytes for a in adapters.values())
    token_bytes = 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, width, bytes
    assert found["kv_cache"] == token_bytes * 4 * 128
    assert found["prefix_cache"] == token_bytes * 64 * len(adapters)
    linears = [m.weight for m in base.model.modules() if isinstance(m, nn.Linear)]
    packs = can_pack(linears[0])
    assert found["packed"] == (sum(w.numel() * 2 for w in linears) if packs else 0)
    assert Engine(base, pack_weights=False).memory()["packed"] == 0
