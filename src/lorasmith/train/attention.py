"""Causal attention for training on a CPU, tile by tile.

Semantics, each key and value head serving `heads / kv_heads` query heads:
    S = scale · q @ kᵀ + mask           slots after the query, and masked ones, at −∞
    o = softmax(S) @ v
PyTorch's fused CPU kernel takes three times as long for rows of 256 and twice as long at 1,024
(figures: dev/LOG.md): matrix multiplication is what is fast there. So a tile is one batched product
of a block of queries with the keys up to its end: little is computed beyond the diagonal, keys are
never repeated, and a tile's scores stay in the cache. Backward forms the scores again: what is
saved are q, k and v, linear in the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Queries per tile."""
TILE_BYTES = 1 << 20
"""Scores of one tile, to stay in the second-level caches of two cores."""

Where = tuple[slice, ...]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    """Attention of every slot over the slots up to its own that `mask` lets it see.

    Args:
        q: (batch, heads, slots, d). k, v: (batch, kv_heads, slots, d).
        mask: None, booleans (True is seen) or what is added to the scores, (batch or 1, 1, slots, slots).
            Each slot must see at least one slot up to its own.

    Returns:
        (batch, heads, slots, d) in the dtype of q. The scores are rounded to it before the softmax.
    """
    result: Tensor = _attend(q, k, v, mask, scale)
    return result


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`causal_attention` without autograd."""
    if q.device.type != "cpu":
        return _fused(q, k, v, mask, scale)
    q = _by_kv_head(q, k)
    o = _empty_by_kv_head(q, v.shape[3])
    for queries, keys in _tiles(q):
        P = _probabilities(_flat(q[queries]), _flat(k[keys]), _part(mask, queries, keys), scale, queries)
        o[queries] = torch.bmm(P, _flat(v[keys])).view(o[queries].shape)
    return o.flatten(1, 2)


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from that of the outputs."""
    if q.device.type != "cpu":
        with torch.enable_grad():
            leaves = (
                q.detach().requires_grad_(),
                k.detach().requires_grad_(),
                v.detach().requires_grad_(),
            )
            o = _fused(*leaves, mask, scale)
        return torch.autograd.grad(o, leaves, do)  # type: ignore[return-value]
    q, do = _by_kv_head(q, k), _by_kv_head(do, k)
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = _empty_by_kv_head(q, q.shape[4])
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for queries, keys in _tiles(q):
        Q, K, V, d = _flat(q[queries]), _flat(k[keys]), _flat(v[keys]), _flat(do[queries])
        P = _probabilities(Q, K, _part(mask, queries, keys), scale, queries)
        dv[keys] += torch.bmm(P.mT, d).view(dv[keys].shape)
        dS = torch._softmax_backward_data(torch.bmm(d, V.mT), P, -1, P.dtype).mul_(scale)
        dq[queries] = torch.bmm(dS, K).view(dq[queries].shape)
        dk[keys] += torch.bmm(dS.mT, Q).view(dk[keys].shape)
    return dq.flatten(1, 2), dk.to(k.dtype), dv.to(v.dtype)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """PyTorch's own kernel: what a GPU wants."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )


_attend = torch.library.custom_op("lorasmith::causal_attention", attend, mutates_args=())
_differentiate = torch.library.custom_op(
    "lorasmith::causal_attention_backward", attend_backward, mutates_args=()
)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return _empty_by_kv_head(_by_kv_head(q, k), v.shape[3]).flatten(1, 2)


@_differentiate.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq = _empty_by_kv_head(_by_kv_head(q, k), q.shape[3]).flatten(1, 2)
    return dq, torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask)


def _backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask = ctx.saved_tensors
    return (*_differentiate(do, q, k, v, mask, ctx.scale), None, None)


_attend.register_autograd(_backward, setup_context=_save)


def _tiles(q: Tensor) -> Iterator[tuple[Where, Where]]:
    """Where in q (batch, kv_heads, heads of each, slots, d) and in k each tile lies."""
    batch, kv_heads, of_each, slots, _ = q.shape
    for start in range(0, slots, BLOCK):
        end = min(start + BLOCK, slots)
        pairs = max(1, TILE_BYTES // (of_each * (end - start) * end * q.element_size()))
        rows, heads = max(1, pairs // kv_heads), min(kv_heads, pairs)
        for r in range(0, batch, rows):
            for h in range(0, kv_heads, heads):
                where = slice(r, min(r + rows, batch)), slice(h, min(h + heads, kv_heads))
                yield (*where, slice(None), slice(start, end)), (*where, slice(0, end))


def _probabilities(Q: Tensor, K: Tensor, mask: Tensor | None, scale: float, queries: Where) -> Tensor:
    """softmax(scale · Q @ Kᵀ + mask), (rows · kv_heads, heads of each · queries, keys)."""
    S = torch.bmm(Q, K.mT).mul_(scale)
    block = queries[3]
    if mask is None:
        size = block.stop - block.start
        later = S.new_full((size, size), float("-inf")).triu_(1)
        S.view(len(S), -1, size, block.stop)[..., block] += later
    else:
        scores = S.view(queries[0].stop - queries[0].start, -1, block.stop - block.start, block.stop)
        scores.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else scores.add_(mask)
    return torch.softmax(S, -1)


def _part(mask: Tensor | None, queries: Where, keys: Where) -> Tensor | None:
    if mask is None:
        return None
    return mask[queries[0] if len(mask) > 1 else slice(None), :, queries[3], keys[2]]


def _flat(x: Tensor) -> Tensor:
    """Rows and key heads as one batch dimension, the query heads of one key head one below the other."""
    x = x.contiguous()
    return x.view(x.shape[0] * x.shape[1], -1, x.shape[-1])


def _by_kv_head(x: Tensor, k: Tensor) -> Tensor:
    return x.view(x.shape[0], k.shape[1], -1, *x.shape[2:])


def _empty_by_kv_head(q: Tensor, width: int) -> Tensor:
    """Like q, with each slot's heads side by side in memory: what the next layer reads."""
    batch, kv_heads, of_each, slots, _ = q.shape
    return q.new_empty(batch, slots, kv_heads, of_each, width).permute(0, 2, 3, 1, 4)
