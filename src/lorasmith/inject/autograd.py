"""The lean LoRA forward and backward, written by hand, for linear layers that share one input.

Semantics, for each layer i of the group:
    xd  = x ⊙ mask / (1 − p)          (only with dropout; the mask is remade from its seed)
    y_i = x @ W_iᵀ + b_i + scaling_i · (xd @ A_iᵀ) @ B_iᵀ
A layer without factors (A and B are None) is a plain one: no second term.
A quantised W_i is None among the tensors: `Spec.quantised` makes it anew for each product.
Saved for backward: x itself (no copy, no cast) and u = xd @ [A_1; A_2; …]ᵀ, which is Σ rank wide.
That is tokens · Σ rank · itemsize bytes on top of x, which the base's own backward would not
keep, since its weights are frozen.

Rows of many adapters (`Segmented`): the base's products run over all rows at once, everything of low
rank over each segment alone, by the very calls that its adapter would make alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.quantised import QuantisedLinear

PARTS = 4  # tensors per layer: W, b, A, B


@dataclass(frozen=True)
class Spec:
    """What the layers of one group are, besides their tensors.

    Attributes:
        scalings: of each layer.
        transposed: of each layer: W is stored (in_features, out_features).
        dropout: share of the low-rank branch's input that is zeroed; 0 outside training.
        seed: of the dropout mask.
        quantised: of each layer, where its W is quantised: the layer; empty if none can be.
    """

    scalings: tuple[float, ...]
    transposed: tuple[bool, ...]
    dropout: float = 0.0
    seed: int = 0
    quantised: tuple[QuantisedLinear | None, ...] = ()


@dataclass(frozen=True)
class Segmented:
    """Layers of one group under many adapters, each with contiguous rows of its own.

    The tensors of a segmented computation are those of each segment in turn, so W and b come again with
    every segment. They never train here.

    Attributes:
        specs: of each segment; they agree in `transposed`.
        rows: rows of each segment, in order; together all rows of the batch, or those that it divides into.
    """

    specs: tuple[Spec, ...]
    rows: tuple[int, ...]

    def slices(self, tokens: int) -> list[slice]:
        """Which of `tokens` flat slots belong to each segment."""
        slots = tokens // sum(self.rows)
        ends = list(accumulate(rows * slots for rows in self.rows))
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def lora_linears(x: Tensor, spec: Spec | Segmented, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Outputs of every layer of the group.

    Args:
        x: (…, in_features).
        tensors: W (None if quantised), b or None, A and B (or None, None) of each layer in turn. A and B may be wider than x
            (float32 masters over bfloat16): the product is formed in x's dtype. If segmented, so for
            each segment in turn.
    """
    if torch.is_grad_enabled():
        return LoRALinears.apply(x, spec, *tensors)  # type: ignore[no-untyped-call, no-any-return]
    return linear_outputs(x, spec, tensors)[0]


class LoRALinears(torch.autograd.Function):
    """Autograd node of `lora_linears`."""

    @staticmethod
    def forward(x: Tensor, spec: Spec | Segmented, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Outputs of each layer, then u, which only backward uses."""
        outputs, u = linear_outputs(x, spec, tensors)
        return (*outputs, u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep x, u and references to the weights."""
        x, spec, *tensors = inputs
        ctx.spec = spec
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[-1], *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x and of each layer's tensors, in the order of `forward`."""
        x, u, *tensors = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        dx, results = linear_gradients(x, u, ctx.spec, tensors, grads[:-1], needs_x=needs_x, needs=needs)
        return (dx, None, *results)


def linear_outputs(
    x: Tensor, spec: Spec | Segmented, tensors: Sequence[Tensor | None]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Outputs of each layer, and u: (tokens, Σ rank), or if segmented those of each segment end to end."""
    segments = _segments(spec, tensors, x)
    outputs = _base_outputs(x, segments[0])
    us = [_add_low_rank(x.reshape(-1, x.shape[-1])[s.where], s, outputs) for s in segments]
    return outputs, torch.cat([u.flatten() for u in us]) if isinstance(spec, Segmented) else us[0]


def linear_gradients(
    x: Tensor,
    u: Tensor,
    spec: Spec | Segmented,
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    *,
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of each layer's tensors, from those of the outputs.

    Args:
        needs: for each of `tensors`, whether its gradient is wanted.
    """
    segments = _segments(spec, tensors, x)
    flat = x.reshape(-1, x.shape[-1])
    flat_grads = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
    dx = _base_input_gradient(flat_grads, segments[0]) if needs_x else None
    results: list[Tensor | None] = []
    start = 0
    for segment in segments:
        where, width = segment.where, sum(c.stop - c.start for c in segment.columns)
        rows = len(flat[where])
        own_u = u[start : start + rows * width].view(rows, width) if isinstance(spec, Segmented) else u
        start += rows * width
        results += _segment_gradients(
            flat[where],
            own_u,
            segment,
            [None if g is None else g[where] for g in flat_grads],
            dx=None if dx is None else dx[where],
            needs=needs[len(results) :],
        )
    return None if dx is None else dx.view(x.shape), results


def _base_outputs(x: Tensor, segment: _Segment) -> tuple[Tensor, ...]:
    pairs = zip(segment.layers, segment.spec.transposed, strict=True)
    return tuple(
        base_linear(x, _whole(layer.W, x), layer.b, transposed=transposed) for layer, transposed in pairs
    )


def _add_low_rank(flat: Tensor, segment: _Segment, outputs: Sequence[Tensor]) -> Tensor:
    """Add the second term to the segment's part of the outputs; returns u."""
    spec, layers = segment.spec, segment.layers
    stacked = _stacked_A(layers, flat.dtype)
    xd = flat * dropout_mask(flat, spec) if spec.dropout and stacked is not None else flat
    u = flat.new_empty(len(flat), 0) if stacked is None else xd @ stacked.T
    for layer, columns, scaling, y in zip(layers, segment.columns, spec.scalings, outputs, strict=True):
        if layer.B is not None:
            own = y.view(-1, y.shape[-1])[segment.where]
            own.addmm_(u[:, columns], (layer.B.to(flat.dtype) * scaling).T)
    return u


def _base_input_gradient(grads: Sequence[Tensor | None], segment: _Segment) -> Tensor | None:
    dx: Tensor | None = None
    for layer, transposed, g in zip(segment.layers, segment.spec.transposed, grads, strict=True):
        if g is not None:
            W = _whole(layer.W, g)
            out_by_in = W.T if transposed else W
            dx = g @ out_by_in if dx is None else dx.addmm_(g, out_by_in)
    return dx


def _segment_gradients(
    flat: Tensor,
    u: Tensor,
    segment: _Segment,
    grads: Sequence[Tensor | None],
    *,
    dx: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the segment's tensors; `dx` gains the second term's part in place."""
    spec, layers = segment.spec, segment.layers
    mask = dropout_mask(flat, spec) if spec.dropout and u.shape[1] else None
    du = torch.zeros_like(u) if any(g is None for g in grads) else torch.empty_like(u)
    results: list[Tensor | None] = []
    for i, (layer, columns, g) in enumerate(zip(layers, segment.columns, grads, strict=True)):
        if g is None:
            results += [None] * PARTS
            continue
        _, b, _, B = layer
        needs_W, needs_b, _, needs_B = needs[PARTS * i : PARTS * (i + 1)]
        dW = (flat.T @ g if spec.transposed[i] else g.T @ flat) if needs_W else None
        db = g.sum(0, dtype=b.dtype) if needs_b and b is not None else None
        dB = None
        if B is not None:
            du[:, columns] = g @ (B.to(g.dtype) * spec.scalings[i])
            dB = (g.T @ u[:, columns]).to(B.dtype).mul_(spec.scalings[i]) if needs_B else None
        results += [dW, db, None, dB]
    _add_low_rank_gradients(flat, du, mask, layers, results, needs)
    stacked = None if dx is None else _stacked_A(layers, du.dtype)
    if dx is not None and stacked is not None:
        _ = dx.addmm_(du, stacked) if mask is None else dx.add_((du @ stacked).mul_(mask))
    return results


def _add_low_rank_gradients(
    flat: Tensor,
    du: Tensor,
    mask: Tensor | None,
    layers: Sequence[_Layer],
    results: list[Tensor | None],
    needs: Sequence[bool],
) -> None:
    if not any(needs[PARTS * i + 2] for i in range(len(layers))):
        return
    stacked = du.T @ (flat if mask is None else flat * mask)
    for i, (layer, columns) in enumerate(zip(layers, _columns(layers), strict=True)):
        if layer.A is not None and needs[PARTS * i + 2]:
            results[PARTS * i + 2] = stacked[columns].to(layer.A.dtype)


def base_linear(x: Tensor, W: Tensor, b: Tensor | None, *, transposed: bool) -> Tensor:
    """The frozen layer by the very calls that `nn.Linear` and `Conv1D` make, so bits agree."""
    if not transposed:
        return F.linear(x, W, b)
    flat = x.view(-1, x.shape[-1])
    y = torch.mm(flat, W) if b is None else torch.addmm(b, flat, W)
    return y.view(*x.shape[:-1], W.shape[1])


def dropout_mask(x: Tensor, spec: Spec) -> Tensor:
    """0 or 1/(1 − p) for each element of x, the same for the same seed."""
    generator = torch.Generator(device=x.device).manual_seed(spec.seed)
    keep = 1 - spec.dropout
    return torch.empty_like(x).bernoulli_(keep, generator=generator).div_(keep)


class _Layer(NamedTuple):
    W: Tensor | QuantisedLinear
    b: Tensor | None
    A: Tensor | None
    B: Tensor | None


class _Segment(NamedTuple):
    """Tokens that one adapter computes for, and with what."""

    where: slice
    spec: Spec
    layers: list[_Layer]
    columns: list[slice]


def _segments(spec: Spec | Segmented, tensors: Sequence[Tensor | None], x: Tensor) -> list[_Segment]:
    if not isinstance(spec, Segmented):
        layers = _layers(tensors, spec)
        return [_Segment(slice(None), spec, layers, _columns(layers))]
    each = len(tensors) // len(spec.specs)
    slices = spec.slices(x.numel() // x.shape[-1])
    found = []
    for i, (where, own) in enumerate(zip(slices, spec.specs, strict=True)):
        layers = _layers(tensors[i * each : (i + 1) * each], own)
        found.append(_Segment(where, own, layers, _columns(layers)))
    return found


def _layers(tensors: Sequence[Tensor | None], spec: Spec) -> list[_Layer]:
    layers = [_Layer(*tensors[i : i + PARTS]) for i in range(0, len(tensors), PARTS)]  # type: ignore[arg-type]
    pairs = (
        zip(layers, spec.quantised, strict=True) if spec.quantised else ((layer, None) for layer in layers)
    )
    return [layer if quantised is None else layer._replace(W=quantised) for layer, quantised in pairs]


def _whole(W: Tensor | QuantisedLinear, like: Tensor) -> Tensor:
    return W if isinstance(W, Tensor) else W.borrow(like.dtype)


def _columns(layers: Sequence[_Layer]) -> list[slice]:
    """Which columns of u belong to each layer."""
    ends = list(accumulate(0 if layer.A is None else len(layer.A) for layer in layers))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _stacked_A(layers: Sequence[_Layer], dtype: torch.dtype) -> Tensor | None:
    parts = [layer.A for layer in layers if layer.A is not None]
    if not parts:
        return None
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)
