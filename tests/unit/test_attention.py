"""Attention by tiles against a float64 loop over slots; every boundary of the tiles."""

from __future__ import annotations

import importlib

import pytest
import torch

from lorasmith.bases import attention as attention_of
from tests.support.models import VOCAB, tiny_causal_lm
from tests.support.tolerance import close

room = importlib.import_module("lorasmith.train.attention")


def inputs(batch, heads, kv_heads, slots, d, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, slots, heads, d)] + [(batch, slots, kv_heads, d)] * 2
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2) for s in shapes]


def by_slots(q, k, v, visible, scale):
    """softmax over the visible slots, one slot and head at a time."""
    of_each = q.shape[1] // k.shape[1]
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = visible[b % len(visible), 0, i].nonzero()[:, 0]
                scores = scale * (k[b, h // of_each, seen] @ q[b, h, i])
                rows.append(torch.softmax(scores, 0) @ v[b, h // of_each, seen])
    return torch.stack(rows).view(*q.shape[:3], -1)


def causal(slots):
    return torch.ones(1, 1, slots, slots, dtype=torch.bool).tril()


def random_visible(batch, slots, seed=1):
    keep = torch.rand(batch, 1, slots, slots, generator=torch.Generator().manual_seed(seed)) < 0.5
    return (keep | torch.eye(slots, dtype=torch.bool)).tril()


@pytest.fixture(
    params=[(4, 1 << 20), (3, 1), (64, 1 << 20)], ids=["small-blocks", "one-head-tiles", "default"]
)
def tiles(request, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", request.param[0])
    monkeypatch.setattr(room, "TILE_BYTES", request.param[1])


@pytest.mark.parametrize("shape", [(2, 4, 2, 13, 8), (1, 3, 3, 1, 4), (3, 4, 1, 12, 6)])
@pytest.mark.parametrize("masking", ["none", "bool", "additive", "shared"])
def test_outputs_and_gradients_are_those_of_a_loop(tiles, shape, masking):
    q, k, v = (x.requires_grad_() for x in inputs(*shape, torch.float64))
    slots = shape[3]
    visible = (
        causal(slots) if masking == "none" else random_visible(1 if masking == "shared" else shape[0], slots)
    )
    mask = {"none": None, "bool": visible, "shared": visible}.get(masking, visible)
    if masking == "additive":
        mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, float("-inf"))
    o = room.causal_attention(q, k, v, mask, scale=0.3)
    expected = by_slots(q, k, v, visible, 0.3)
    close(o, expected, torch.float64)
    do = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad(o, [q, k, v], do)
    for a, b in zip(found, torch.autograd.grad(expected, [q, k, v], do), strict=True):
        close(a, b, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_within_the_table(dtype):
    q, k, v = inputs(2, 4, 2, 150, 16, dtype)
    expected = by_slots(*(x.double() for x in (q, k, v)), causal(150), 0.25)
    close(room.causal_attention(q, k, v, None, scale=0.25), expected, dtype)


def test_gradcheck(tiles):
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 1, 7, 3, torch.float64))
    assert torch.autograd.gradcheck(lambda *x: room.causal_attention(*x, None, scale=0.5), (q, k, v))


def test_no_slot_sees_what_comes_after_it():
    q, k, v = inputs(1, 2, 2, 90, 8, torch.float32)
    before = room.causal_attention(q, k, v, None, scale=0.3)
    k[:, :, 60:], v[:, :, 60:] = 7.0, -3.0
    after = room.causal_attention(q, k, v, None, scale=0.3)
    assert torch.equal(before[:, :, :60], after[:, :, :60])
    assert not torch.equal(before[:, :, 60:], after[:, :, 60:])


def test_what_is_saved_grows_with_the_length_alone():
    sizes = []

    def remember(x):
        sizes.append(x.numel())
        return x

    q, k, v = (x.requires_grad_() for x in inputs(1, 4, 2, 200, 8, torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        room.causal_attention(q, k, v, None, scale=0.3)
    assert sum(sizes) == q.numel() + k.numel() + v.numel()


def test_the_fused_route_of_other_devices_computes_the_same(monkeypatch):
    q, k, v = inputs(2, 4, 2, 9, 8, torch.float32)
    do = torch.ones(2, 4, 9, 8)
    expected = [room.attend(q, k, v, None, 0.3), *room.attend_backward(do, q, k, v, None, 0.3)]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = room._fused(*leaves, None, 0.3)
    for a, b in zip([o, *torch.autograd.grad(o, leaves, do)], expected, strict=True):
        close(a, b, torch.float32)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_a_model_takes_the_function_and_gives_it_back(family):
    model = tiny_causal_lm(family)
    ids = torch.arange(40)[None] % VOCAB
    calls = []

    def function(*args, scale):
        calls.append(scale)
        return room.causal_attention(*args, scale=scale)

    expected = model(input_ids=ids, use_cache=False).logits
    with attention_of(model, function) as takes_part:
        assert takes_part
        close(model(input_ids=ids, use_cache=False).logits, expected, torch.float32)
    assert len(calls) == 2
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    assert len(calls) == 2


def test_a_model_with_a_soft_cap_does_not_take_part():
    model = tiny_causal_lm("gemma2")  # computes attention eagerly
    with attention_of(model, lambda *_, **__: pytest.fail("called")) as takes_part:
        assert not takes_part
        model(input_ids=torch.arange(5)[None], use_cache=False)
