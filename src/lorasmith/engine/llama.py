"""The fast runner: our own forward pass for Llama, Mistral, Qwen2, Qwen3 and what is built like them.

It reads the model's own modules (norms, rotary embedding, weights) and computes the same function with
fewer and larger products, on a cache that attention reads in place.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.engine import native
from lorasmith.engine.cache import KVCache, KVShape
from lorasmith.engine.generic import GenericRunner
from lorasmith.engine.kernels import LinearGroup, calibrate, can_pack
from lorasmith.engine.native_llama import DecodeOps, Positions
from lorasmith.engine.pages import give_back
from lorasmith.engine.runner import Batch, rows_of
from lorasmith.engine.slots import GroupSpec, Slots, add_lora

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MEMBERS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def why_not_fast(model: nn.Module) -> str | None:
    """Why this model needs the generic runner; None if the fast one computes it."""
    config: Any = getattr(model, "config", None)
    if type(model).__name__ not in FAMILY:
        return f"{type(model).__name__} is not of the Llama family"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        return f"it attends through a window of {window} tokens"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "its layers attend in several ways"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    if _rope_type(config) not in ("default", "linear", "llama3", "yarn"):
        return f"its rotary embedding ({_rope_type(config)}) depends on the length of the batch"
    plain = all(type(m) is nn.Linear for name, m in model.named_modules() if name.endswith("_proj"))
    return None if plain else "some of its linear layers are not plain nn.Linear"


@dataclass
class Layer:
    """One decoder layer: its modules, grouped."""

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    groups: tuple[LinearGroup, LinearGroup, LinearGroup, LinearGroup]
    native: Any = None  # the constants of its attention, where decoding goes through C


class LlamaRunner:
    """See the module's docstring. `exact` makes every row's bits independent of its neighbours."""

    name = "fast"
    is_solo = False

    def __init__(self, model: Any, *, max_rows: int, pack: bool = True, exact: bool = False) -> None:
        self.model = model
        self.exact = exact
        self._max_rows = max_rows
        self._attached: GenericRunner | None = None
        config = model.config
        attention = model.model.layers[0].self_attn
        self._head_dim = int(attention.head_dim)
        self._scaling = float(attention.scaling)
        self._heads = int(config.num_attention_heads)
        self._kv_heads = int(config.num_key_value_heads)
        self._eps = float(config.rms_norm_eps)
        self.vocab_size = int(config.vocab_size)
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        weight: Tensor = model.model.embed_tokens.weight
        self._dtype = weight.dtype
        self._pack = pack and can_pack(weight)
        self._ops = None
        if native.is_available(weight.dtype, weight.device):
            self._ops = DecodeOps(self._heads, self._kv_heads, self._head_dim, self._scaling, self._eps)
        self._layers = [self._layer(layer) for layer in model.model.layers]
        self._head = LinearGroup([model.lm_head], pack=self._pack)
        if self._pack and not exact:  # deterministic mode knows one kernel only
            calibrate([g for layer in self._layers for g in layer.groups])
        self._give_back_pages()
        dims = ((self._kv_heads, self._head_dim),) * len(self._layers)
        self.cache = KVCache(KVShape(dims, dims, weight.dtype, weight.device), max_rows)
        self.slots = Slots(self._specs(), weight.dtype, weight.device)
        self.is_row_invariant = exact and self._gives_rows_their_own_bits()

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed second copy of the weights."""
        return sum(g.packed_bytes for layer in self._layers for g in layer.groups) + self._head.packed_bytes

    def refresh(self) -> None:
        """Pack the model's present weights again."""
        if self._pack:
            for group in (*(g for layer in self._layers for g in layer.groups), self._head):
                group.repack()
            self._give_back_pages()

    def _give_back_pages(self) -> None:
        """Where the packed copy computes, the weights of the file need not stay in memory."""
        if self._pack:
            groups = [g for layer in self._layers for g in layer.groups if g.plain_from is None]
            give_back([module.weight for group in groups for module in group.modules])

    def renewed(self) -> LlamaRunner:
        """The same weights, with a cache, slots and working memory of its own."""
        other = copy.copy(self)
        other.cache, other.slots, other._attached = self.cache.renewed(), self.slots.renewed(), None
        if self._ops is not None:
            other._ops = self._ops.renewed()
        return other

    def attached(self) -> GenericRunner:
        """The model's own forward on this runner's cache, made when it is first needed."""
        if self._attached is None:
            self._attached = GenericRunner(
                self.model, max_rows=self._max_rows, exact=self.exact, cache=self.cache
            )
        return self._attached

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits after the last new token of each row, (rows, vocabulary)."""
        new = batch.tokens.shape[1]
        self.cache.reserve(batch.span + (len(batch.rows) > 1 and new > 1))
        if new == 1 and self._ops is not None:
            return self._decode(batch, self._ops)
        step = self._plan(batch)
        x = F.embedding(batch.tokens.flatten(), self.model.model.embed_tokens.weight)
        for number, layer in enumerate(self._layers):
            x = self._attend(x, number, layer, step)
            x = self._mlp(x, number, layer, step)
        last = torch.tensor([i * new + n - 1 for i, n in enumerate(batch.lengths)], device=x.device)
        x = F.rms_norm(x.index_select(0, last), (x.shape[-1],), self.model.model.norm.weight, self._eps)
        return self._linear(x, self._head, 4 * len(self._layers), batch)

    def _decode(self, batch: Batch, ops: DecodeOps) -> Tensor:
        """`forward` for one new token per row, through the C functions."""
        starts = torch.tensor(batch.starts)
        x = F.embedding(batch.tokens.flatten(), self.model.model.embed_tokens.weight)
        cos, sin = self.model.model.rotary_emb(x, starts[:, None])
        at = Positions(
            torch.tensor(batch.rows), starts, cos.contiguous(), sin.contiguous(), max(batch.starts)
        )
        more: Tensor | None = None
        for number, layer in enumerate(self._layers):
            h = ops.add_norm(x, more, layer.input_norm)
            qkv = self._linear(h, layer.groups[0], 4 * number, batch)
            h = ops.attend(qkv, layer.native, self.cache.keys[number], self.cache.values[number], at)
            h = ops.add_norm(x, self._linear(h, layer.groups[1], 4 * number + 1, batch), layer.post_norm)
            h = ops.silu_mul(self._linear(h, layer.groups[2], 4 * number + 2, batch))
            more = self._linear(h, layer.groups[3], 4 * number + 3, batch)
        x = ops.add_norm(x, more, self.model.model.norm.weight)
        return self._linear(x, self._head, 4 * len(self._layers), batch)

    def _gives_rows_their_own_bits(self) -> bool:
        """Try it: a full batch, the same rows turned round, and rows with other neighbours."""
        rows = self._max_rows
        device = self.cache.shape.device
        tokens = torch.arange(1, rows + 1, device=device)[:, None] % self.vocab_size

        def logits(order: Tensor) -> Tensor:
            return self.forward(Batch(order, range(rows), [0] * rows, [1] * rows, None))

        expected, turned = logits(tokens), logits(tokens.flip(0)).flip(0)
        alone = torch.cat([logits(tokens[i : i + 1].expand(rows, 1).contiguous())[:1] for i in range(rows)])
        return torch.equal(expected, turned) and torch.equal(expected, alone)

    def _plan(self, batch: Batch) -> _Step:
        rows, new = batch.tokens.shape
        device = batch.tokens.device
        starts = torch.tensor(batch.starts, device=device)
        positions = starts[:, None] + torch.arange(new, device=device)
        cos, sin = self.model.model.rotary_emb(self.model.model.norm.weight, positions)
        half = self._head_dim // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        span = batch.span
        mask = None
        is_causal = new > 1 and max(batch.starts) == 0
        if not is_causal and not (self.exact and new == 1):
            visible = torch.arange(span, device=device) <= positions[:, :, None]
            mask = torch.zeros(visible.shape, dtype=self._dtype, device=device)
            mask = mask.masked_fill_(~visible, float("-inf"))[:, None]
        return _Step(
            batch=batch,
            rows=rows_of(batch),
            cos=cos.reshape(rows * new, 1, -1),
            sin=signed.reshape(rows * new, 1, -1),
            # The padding of a short row is written behind the longest one, where nobody reads it.
            index=self.cache.flat_index(torch.tensor(batch.rows, device=device), positions.clamp(max=span)),
            span=span,
            mask=mask,
            is_causal=is_causal,
        )

    def _attend(self, x: Tensor, number: int, layer: Layer, step: _Step) -> Tensor:
        heads, kv, width = self._heads, self._kv_heads, self._head_dim
        h = F.rms_norm(x, (x.shape[-1],), layer.input_norm, self._eps)
        y = self._linear(h, layer.groups[0], 4 * number, step.batch)
        qkv = y.view(-1, heads + 2 * kv, width)
        qk = self._normed_heads(qkv[:, : heads + kv], layer)
        turned = qk.reshape(-1, heads + kv, 2, width // 2).flip(2).view(qk.shape)
        qk = torch.addcmul(qk * step.cos, turned, step.sin)
        self.cache.keys[number].view(-1, kv, width).index_copy_(0, step.index, qk[:, heads:])
        self.cache.values[number].view(-1, kv, width).index_copy_(0, step.index, qkv[:, heads + kv :])
        out = self._attention(qk[:, :heads], number, step)
        return self._linear(out, layer.groups[1], 4 * number + 1, step.batch).add_(x)

    def _normed_heads(self, qk: Tensor, layer: Layer) -> Tensor:
        if layer.q_norm is None or layer.k_norm is None:
            return qk
        width = (self._head_dim,)
        q = F.rms_norm(qk[:, : self._heads], width, layer.q_norm, self._eps)
        return torch.cat((q, F.rms_norm(qk[:, self._heads :], width, layer.k_norm, self._eps)), dim=1)

    def _attention(self, q: Tensor, number: int, step: _Step) -> Tensor:
        """Softmax attention of the new queries over their rows' cache, (rows · new, heads · width)."""
        rows, new = step.batch.tokens.shape
        keys = self.cache.keys[number][step.rows]
        values = self.cache.values[number][step.rows]
        if new > 1:
            return self._attention_of_many(q, keys, values, step)
        q = q.view(rows, self._kv_heads, -1, self._head_dim)
        if step.mask is None:
            return self._attention_alone(q, keys, values, step)
        k, v = keys[:, : step.span].transpose(1, 2), values[:, : step.span].transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, step.mask, scale=self._scaling).reshape(rows, -1)

    def _attention_of_many(self, q: Tensor, keys: Tensor, values: Tensor, step: _Step) -> Tensor:
        rows, new = step.batch.tokens.shape
        q = q.view(rows, new, self._heads, self._head_dim).transpose(1, 2)
        repeat = self._heads // self._kv_heads
        k = keys[:, : step.span].transpose(1, 2).repeat_interleave(repeat, dim=1)
        v = values[:, : step.span].transpose(1, 2).repeat_interleave(repeat, dim=1)
        out = F.scaled_dot_product_attention(
            q, k, v, step.mask, is_causal=step.is_causal, scale=self._scaling
        )
        return out.transpose(1, 2).reshape(rows * new, -1)

    def _attention_alone(self, q: Tensor, keys: Tensor, values: Tensor, step: _Step) -> Tensor:
        """Each row over its own span, so that its bits do not depend on the longest row."""
        outputs = []
        for row, start in enumerate(step.batch.starts):
            k = keys[row : row + 1, : start + 1].transpose(1, 2)
            v = values[row : row + 1, : start + 1].transpose(1, 2)
            out = F.scaled_dot_product_attention(q[row : row + 1], k, v, scale=self._scaling)
            outputs.append(out.reshape(1, -1))
        return torch.cat(outputs)

    def _mlp(self, x: Tensor, number: int, layer: Layer, step: _Step) -> Tensor:
        h = F.rms_norm(x, (x.shape[-1],), layer.post_norm, self._eps)
        y = self._linear(h, layer.groups[2], 4 * number + 2, step.batch)
        gate, up = torch.split_with_sizes(y, layer.groups[2].sizes, dim=-1)
        h = F.silu(gate).mul_(up)
        return self._linear(h, layer.groups[3], 4 * number + 3, step.batch).add_(x)

    def _linear(self, x: Tensor, group: LinearGroup, number: int, batch: Batch) -> Tensor:
        """The outputs of the group's members side by side."""
        y = group(x)
        routing = batch.routing
        if routing is not None and routing.active[number]:
            add_lora(y, x, self.slots, number, routing)
        return y

    def _layer(self, layer: Any) -> Layer:
        groups = [
            LinearGroup([layer.get_submodule(path) for path in paths], pack=self._pack) for paths in MEMBERS
        ]
        attention = layer.self_attn
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        return Layer(
            input_norm=layer.input_layernorm.weight,
            post_norm=layer.post_attention_layernorm.weight,
            q_norm=_weight_of(q_norm),
            k_norm=_weight_of(k_norm),
            groups=(groups[0], groups[1], groups[2], groups[3]),
            native=self._ops and self._ops.attention_of(_weight_of(q_norm), _weight_of(k_norm)),
        )

    def _specs(self) -> list[GroupSpec]:
        specs = []
        for number, layer in enumerate(self._layers):
            for paths, group in zip(MEMBERS, layer.groups, strict=True):
                full = tuple(f"model.layers.{number}.{path}" for path in paths)
                specs.append(GroupSpec(full, group.modules[0].in_features, tuple(group.sizes)))
        head = self._head.modules[0]
        return [*specs, GroupSpec(("lm_head",), head.in_features, (head.out_features,))]


@dataclass(frozen=True)
class _Step:
    """What all layers of one forward pass share."""

    batch: Batch
    rows: slice | list[int]
    cos: Tensor
    sin: Tensor
    index: Tensor
    span: int
    mask: Tensor | None
    is_causal: bool


def _rope_type(config: Any) -> str:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return str(parameters.get("rope_type", "default"))


def _weight_of(norm: Any) -> Tensor | None:
    """The weight of a norm that may be absent."""
    return None if norm is None else norm.weight
