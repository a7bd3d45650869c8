"""Causal attention for training on a CPU, tile by tile.

Semantics, each key and value head serving `heads / kv_heads` query heads:
    S = scale · q @ kᵀ + mask           slots after the query, and masked ones, at −∞
    o = softmax(S) @ v
PyTorch's fused CPU kernel takes three times as long for rows of 256 and twice as long at 1,024
(figures: dev/LOG.md): matrix multiplication is what is fast there. So a tile is one batched product
of a block of queries with the keys up to its end: little is computed beyond the diagonal, keys are
never repeated, a tile's scores stay in the cache, and keys that a mask hides from the whole block
are left out. Backward forms the scores again: what is
saved are q, k and v, linear in the length.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Queries per tile."""
TILE_BYTES = 1 << 20
"""Scores of one tile, to stay in the second-level caches of two cores."""

Shape = tuple[int, int, int, int]


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
    for tile in _tiles(q, mask):
        P = _probabilities(_flat(tile.of_queries(q)), tile.keys_of(k), tile.bias, scale)
        here = tile.of_queries(o)
        here.copy_(torch.bmm(P, tile.keys_of(v)).view(here.shape))
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
    for tile in _tiles(q, mask):
        Q, K, V = _flat(tile.of_queries(q)), tile.keys_of(k), tile.keys_of(v)
        d = _flat(tile.of_queries(do))
        P = _probabilities(Q, K, tile.bias, scale)
        tile.add_to_keys(dv, torch.bmm(P.mT, d))
        dS = torch._softmax_backward_data(torch.bmm(d, V.mT), P, -1, P.dtype).mul_(scale)
        here = tile.of_queries(dq)
        here.copy_(torch.bmm(dS, K).view(here.shape))
        tile.add_to_keys(dk, torch.bmm(dS.mT, Q))
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


@dataclass(frozen=True)
class _Tile:
    """A block of queries of some rows and key heads, and the keys that any of them sees.

    Attributes:
        keys: a slice, or the slots themselves where a mask hides most.
        bias: what is added to the scores, (rows or 1, 1, queries, keys).
    """

    rows: slice
    heads: slice
    queries: slice
    keys: slice | Tensor
    bias: Tensor

    def of_queries(self, x: Tensor) -> Tensor:
        """The tile's part of x (batch, kv_heads, heads of each, slots, d)."""
        return x[self.rows, self.heads, :, self.queries]

    def keys_of(self, x: Tensor) -> Tensor:
        """(rows · kv_heads, keys, d) of x (batch, kv_heads, slots, d)."""
        x = x[self.rows, self.heads]
        return _flat(x[:, :, self.keys] if isinstance(self.keys, slice) else x.index_select(2, self.keys))

    def add_to_keys(self, x: Tensor, part: Tensor) -> None:
        """Add `part`, shaped as `keys_of` gives it."""
        x = x[self.rows, self.heads]
        part = part.view(*x.shape[:2], -1, x.shape[3])
        if isinstance(self.keys, slice):
            x[:, :, self.keys].add_(part)
        else:
            x.index_add_(2, self.keys, part.to(x.dtype))


def _tiles(q: Tensor, mask: Tensor | None) -> Sequence[_Tile]:
    batch, kv_heads, of_each, slots, _ = q.shape
    shape = (batch, kv_heads, of_each, slots)
    if mask is None:
        return _causal_tiles(shape, q.dtype, BLOCK, TILE_BYTES)
    # All layers of a step, forward and backward, come with the very same mask.
    tag = (shape, q.dtype, mask._version, BLOCK, TILE_BYTES)
    last = _last_masked[0]
    if last is None or last[0]() is not mask or last[1] != tag:
        last = (weakref.ref(mask), tag, list(_masked_tiles(shape, q.dtype, mask)))
        _last_masked[0] = last
    return last[2]


_last_masked: list[tuple[Any, Any, list[_Tile]] | None] = [None]


@functools.lru_cache(maxsize=8)
def _causal_tiles(shape: Shape, dtype: torch.dtype, block: int, tile_bytes: int) -> list[_Tile]:
    batch, kv_heads, of_each, slots = shape
    tiles = []
    for start in range(0, slots, block):
        end = min(start + block, slots)
        later = torch.full((end - start, end - start), float("-inf"), dtype=dtype).triu_(1)
        bias = torch.cat([later.new_zeros(end - start, start), later], 1)[None, None]
        pairs = max(1, tile_bytes // (of_each * (end - start) * end * dtype.itemsize))
        rows, heads = max(1, pairs // kv_heads), min(kv_heads, pairs)
        for r in range(0, batch, rows):
            for h in range(0, kv_heads, heads):
                where = slice(r, min(r + rows, batch)), slice(h, min(h + heads, kv_heads))
                tiles.append(_Tile(*where, slice(start, end), slice(0, end), bias))
    return tiles


def _masked_tiles(shape: Shape, dtype: torch.dtype, mask: Tensor) -> Iterator[_Tile]:
    """Row by row: what a block sees differs, and sequences packed into one row hide most of it."""
    batch, kv_heads, of_each, slots = shape
    for row in range(batch):
        own = mask[min(row, len(mask) - 1), 0]
        for start in range(0, slots, BLOCK):
            block = slice(start, min(start + BLOCK, slots))
            part = own[block, : block.stop]
            if part.dtype == torch.bool:
                part = torch.zeros(part.shape, dtype=dtype).masked_fill_(~part, float("-inf"))
            seen = (part > float("-inf")).any(0).nonzero()[:, 0]
            keys: slice | Tensor = seen if len(seen) <= 0.8 * block.stop else slice(0, block.stop)
            bias = part[:, keys].to(dtype).contiguous()[None, None]
            pairs = max(1, TILE_BYTES // (of_each * bias.numel() * dtype.itemsize))
            for h in range(0, kv_heads, pairs):
                yield _Tile(slice(row, row + 1), slice(h, min(h + pairs, kv_heads)), block, keys, bias)


def _probabilities(Q: Tensor, K: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale · Q @ Kᵀ + bias), (rows · kv_heads, heads of each · queries, keys)."""
    S = torch.bmm(Q, K.mT).mul_(scale)
    S.view(len(S), -1, *bias.shape[2:]).add_(bias)
    return torch.softmax(S, -1)


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
