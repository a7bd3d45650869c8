"""A decoder layer of the Llama family as one autograd node that keeps little.

Semantics: exactly the layer's own forward,
    x₂ = x + o_proj(attention(rotate(q, k), v))      q, k, v = projections of norm₁(x); in Qwen 3
                                                     q and k also go through norms of their own
    y  = x₂ + down_proj(silu(gate) · up)             gate, up = projections of norm₂(x₂)
Saved per token, in numbers of the model's dtype, beside Σ rank of the factors:
    keep="all"    2·width + (2·heads + 2·kv_heads)·head_dim + 2·intermediate
    keep="no-mlp" the same without 2·intermediate: gate and up are multiplied again in backward
    keep="input"  width: the whole layer is computed again
Norms, rotations and silu(gate) · up are cheap to form again, so they are never saved.

Which layers have this shape is found by their parts and proved by a probe (`fast_layers`); no name
of an architecture is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasmith.inject import Spec, linear_gradients, linear_outputs, linear_parts
from lorasmith.train.attention import attend, attend_backward
from lorasmith.train.elementwise import Operations

Keep = Literal["all", "no-mlp", "input"]
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Plan:
    """What one layer computes, besides its tensors."""

    specs: tuple[Spec, ...]
    sizes: tuple[int, ...]  # tensors of each group
    head_dim: int
    scale: float
    eps: float
    keep: Keep
    operations: Operations


class Saved(NamedTuple):
    """What the backward pass of a layer starts from."""

    x: Tensor
    x2: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    u: tuple[Tensor, ...]
    gate: Tensor | None
    up: Tensor | None


class Tensors(NamedTuple):
    """Weights of the norms (of q and k: if there are any), and of each group W, b, A, B of each layer."""

    norm1: Tensor
    norm2: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    groups: tuple[tuple[Tensor | None, ...], ...]


class Rotation(NamedTuple):
    """Angles of each slot, (1 or batch, slots, head_dim), and the attention mask, if any."""

    cosine: Tensor
    sine: Tensor
    mask: Tensor | None


class Block(torch.autograd.Function):
    """Autograd node of one decoder layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        mask: Tensor | None,
        plan: Plan,
        *tensors: Tensor | None,
    ) -> Tensor:
        """y (batch, slots, width)."""
        y, saved = _forward(x, Rotation(cosine, sine, mask), _named(tensors, plan), plan)
        ctx.plan = plan
        kept = _kept(saved, plan.keep)
        ctx.kept, ctx.given = len(kept), len(tensors)
        ctx.save_for_backward(*kept, cosine, sine, mask, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of whatever of the tensors trains."""
        plan: Plan = ctx.plan
        everything = ctx.saved_tensors
        kept, (cosine, sine, mask, *given) = everything[: ctx.kept], everything[ctx.kept :]
        rotation, tensors = Rotation(cosine, sine, mask), _named(given, plan)
        saved = _restore(kept, rotation, tensors, plan)
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        dx, gradients = _backward(dy, saved, rotation, tensors, plan, needs_x=needs_x, needs=needs)
        return (dx, None, None, None, None, *gradients)


def run_block(
    layer: nn.Module, x: Tensor, rotation: Rotation, *, keep: Keep, operations: Operations
) -> Tensor:
    """Output of `layer`, which `is_block` has accepted, for x (batch, slots, width)."""
    modules: Any = layer
    norms = (modules.input_layernorm, modules.post_attention_layernorm, *head_norms(layer))
    tensors: list[Tensor | None] = [None if norm is None else norm.weight for norm in norms]
    specs, sizes = [], []
    for members in linear_groups(layer):
        spec, own = linear_parts(members)
        specs.append(spec)
        sizes.append(len(own))
        tensors += own
    attention = modules.self_attn
    plan = Plan(
        tuple(specs),
        tuple(sizes),
        attention.head_dim,
        attention.scaling,
        modules.input_layernorm.variance_epsilon,
        keep,
        operations,
    )
    return Block.apply(x, *rotation, plan, *tensors)  # type: ignore[no-any-return, no-untyped-call]


def linear_groups(layer: nn.Module) -> list[list[nn.Module]]:
    """The linear layers of a decoder layer, those that share an input together."""
    modules: Any = layer
    owners = (modules.self_attn, modules.self_attn, modules.mlp, modules.mlp)
    return [[getattr(owner, name) for name in names] for owner, names in zip(owners, GROUPS, strict=True)]


def head_norms(layer: nn.Module) -> tuple[Any, Any]:
    """The norms of q and of k, or None twice."""
    modules: Any = layer
    return getattr(modules.self_attn, "q_norm", None), getattr(modules.self_attn, "k_norm", None)


def _named(tensors: Sequence[Tensor | None], plan: Plan) -> Tensors:
    norm1, norm2, q_norm, k_norm, *rest = tensors
    groups = []
    for size in plan.sizes:
        groups.append(tuple(rest[:size]))
        rest = rest[size:]
    assert norm1 is not None
    assert norm2 is not None
    return Tensors(norm1, norm2, q_norm, k_norm, tuple(groups))


def _forward(x: Tensor, rotation: Rotation, t: Tensors, plan: Plan) -> tuple[Tensor, Saved]:
    ops, specs = plan.operations, plan.specs
    h = ops.norm(x, t.norm1, plan.eps)
    (q, k, v), u1 = linear_outputs(h, specs[0], t.groups[0])
    q, k, v = (_by_head(z, plan) for z in (q, k, v))
    turned = _turned(q, t.q_norm, rotation, plan), _turned(k, t.k_norm, rotation, plan)
    at_q, at_k, at_v = (z.transpose(1, 2) for z in (*turned, v))
    o = attend(at_q, at_k, at_v, rotation.mask, plan.scale)
    o = o.transpose(1, 2).flatten(2)
    (x2,), u2 = linear_outputs(o, specs[1], t.groups[1])
    x2.add_(x)
    gate, up, u3 = _gate_up(x2, t, plan)
    m = ops.silu_mul(gate, up)
    (y,), u4 = linear_outputs(m, specs[3], t.groups[3])
    y.add_(x2)
    return y, Saved(x, x2, q, k, v, o, (u1, u2, u3, u4), gate, up)


def _turned(z: Tensor, norm: Tensor | None, rotation: Rotation, plan: Plan) -> Tensor:
    """z (batch, slots, heads, head_dim) normed, if there is a norm, and rotated; without one in place."""
    z = z if norm is None else plan.operations.norm(z, norm, plan.eps)
    return plan.operations.rotate_(z, rotation.cosine, rotation.sine)


def _turned_back(
    dz: Tensor, z: Tensor, norm: Tensor | None, rotation: Rotation, plan: Plan, *, needs_norm: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of z before `_turned`, and of the norm's weight."""
    ops = plan.operations
    dz = ops.rotate_(dz.transpose(1, 2).contiguous(), rotation.cosine, rotation.sine, back=True)
    if norm is None:
        return dz.flatten(2), None
    of_norm = _of_norm_weight(dz, z, plan.eps) if needs_norm else None
    return ops.norm_backward(dz, z, norm, plan.eps, torch.zeros_like(dz)).flatten(2), of_norm


def _gate_up(x2: Tensor, t: Tensors, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    h = plan.operations.norm(x2, t.norm2, plan.eps)
    (gate, up), u = linear_outputs(h, plan.specs[2], t.groups[2])
    return gate, up, u


def _kept(saved: Saved, keep: Keep) -> list[Tensor | None]:
    if keep == "input":
        return [saved.x]
    all_but_mlp: list[Tensor | None] = [saved.x, saved.x2, saved.q, saved.k, saved.v, saved.o, *saved.u]
    return all_but_mlp if keep == "no-mlp" else [*all_but_mlp, saved.gate, saved.up]


def _restore(kept: Sequence[Tensor], rotation: Rotation, t: Tensors, plan: Plan) -> Saved:
    if plan.keep == "input":
        return _forward(kept[0], rotation, t, plan)[1]
    x, x2, q, k, v, o, u1, u2, u3, u4, *rest = kept
    gate, up = rest if rest else _gate_up(x2, t, plan)[:2]
    return Saved(x, x2, q, k, v, o, (u1, u2, u3, u4), gate, up)


def _backward(
    dy: Tensor,
    s: Saved,
    rotation: Rotation,
    t: Tensors,
    plan: Plan,
    *,
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    ops, specs = plan.operations, plan.specs
    starts = [len(t) - 1 + sum(plan.sizes[:i]) for i in range(len(plan.sizes))]
    wanted = [needs[start : start + size] for start, size in zip(starts, plan.sizes, strict=True)]

    def through(
        i: int, x: Tensor, grads: Sequence[Tensor], *, needs_x: bool = True
    ) -> tuple[Any, list[Tensor | None]]:
        return linear_gradients(x, s.u[i], specs[i], t.groups[i], grads, needs_x=needs_x, needs=wanted[i])

    assert s.gate is not None
    assert s.up is not None
    dm, of_down = through(3, ops.silu_mul(s.gate, s.up), [dy])
    dgate, dup = ops.silu_mul_backward(dm, s.gate, s.up)
    dh, of_mlp = through(2, ops.norm(s.x2, t.norm2, plan.eps), [dgate, dup])
    dnorm2 = _of_norm_weight(dh, s.x2, plan.eps) if needs[1] else None
    dx2 = ops.norm_backward(dh, s.x2, t.norm2, plan.eps, dy)
    do, of_o = through(1, s.o, [dx2])
    # Without norms q and k were kept as rotated; with norms, as they came from their projections.
    q = s.q if t.q_norm is None else _turned(s.q, t.q_norm, rotation, plan)
    k = s.k if t.k_norm is None else _turned(s.k, t.k_norm, rotation, plan)
    do, q, k, v = (_by_head(z, plan).transpose(1, 2) for z in (do, q, k, s.v))
    dq, dk, dv = attend_backward(do, q, k, v, rotation.mask, plan.scale)
    dq, dq_norm = _turned_back(dq, s.q, t.q_norm, rotation, plan, needs_norm=needs[2])
    dk, dk_norm = _turned_back(dk, s.k, t.k_norm, rotation, plan, needs_norm=needs[3])
    grads = [dq, dk, dv.transpose(1, 2).flatten(2)]
    needs_h = needs_x or needs[0]
    dh, of_qkv = through(0, ops.norm(s.x, t.norm1, plan.eps), grads, needs_x=needs_h)
    dnorm1 = _of_norm_weight(dh, s.x, plan.eps) if needs[0] else None
    dx = ops.norm_backward(dh, s.x, t.norm1, plan.eps, dx2) if needs_x else None
    return dx, [dnorm1, dnorm2, dq_norm, dk_norm, *of_qkv, *of_o, *of_mlp, *of_down]


def _of_norm_weight(dh: Tensor, x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (dh * normal).flatten(0, -2).sum(0, dtype=wide.dtype).to(x.dtype)


def _by_head(z: Tensor, plan: Plan) -> Tensor:
    """(batch, slots, heads, head_dim), also of what is already so."""
    return z.view(*z.shape[:2], -1, plan.head_dim)
