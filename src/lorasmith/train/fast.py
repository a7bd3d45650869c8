"""Which layers of a model `block` can compute, and computing them so for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.inject import LoRALayer, is_plain_linear
from lorasmith.train.block import Keep, Rotation, linear_groups, run_block
from lorasmith.train.elementwise import Operations, operations
from lorasmith.train.offload import is_paging
from lorasmith.train.shard import gathers, whole

PROBE_SLOTS = 12


@contextmanager
def fast_layers(model: nn.Module, *, keep: Keep = "all") -> Iterator[int]:
    """Compute the decoder layers of `model` by `block` inside the `with`.

    A call that a training step does not make (with a key-value cache, or under autocast) still goes to
    the layer's own forward. Yields how many layers take part: each of the family's shape whose own output
    and gradient the block reproduces on a probe. (Layers of one model may differ in what no part shows:
    SmolLM 3 rotates in some and not in others.)
    """
    layers = [layer for layer in model.modules() if is_block(layer) and _agrees(layer)]
    for layer in layers:
        layer.forward = _forward_of(layer, keep, _operations_of(layer))
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


def is_block(layer: nn.Module) -> bool:
    """Whether `layer` has the parts of a Llama-family decoder layer and nothing else."""
    modules: Any = layer
    if _children(layer) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention, mlp = modules.self_attn, modules.mlp
    names = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj", "act_fn"}
    of_heads = {"q_norm", "k_norm"} & _children(attention)
    if (_children(attention) - of_heads, _children(mlp)) != names or not hasattr(attention, "head_dim"):
        return False
    norms = [modules.input_layernorm, modules.post_attention_layernorm]
    for name in of_heads:
        norms.append(getattr(attention, name))
        if len(of_heads) == 1 or norms[-1].weight.shape != (attention.head_dim,):
            return False
    plain = [m for group in linear_groups(layer) for m in group]
    return (
        type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and all(is_plain_linear(m) for m in plain)
        and all([name for name, _ in norm.named_parameters()] == ["weight"] for norm in norms)
        and len({getattr(norm, "variance_epsilon", index) for index, norm in enumerate(norms)}) == 1
        and not any(_is_hooked(m) for m in layer.modules())
        and len({(p.dtype, p.device) for name, p in layer.named_parameters() if "lora_" not in name}) == 1
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_hooked(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    replaced = {"forward", "virtual_tokens"} & vars(module).keys()  # the second: prefix and prompt tuning
    hooks = [hook for kind in kinds for hook in getattr(module, kind).values()]
    return not all(gathers(hook) or is_paging(hook) for hook in hooks) or bool(replaced)


def _operations_of(layer: nn.Module) -> Operations:
    modules: Any = layer
    weight: Tensor = modules.input_layernorm.weight
    return operations(weight.dtype, weight.device)


def _forward_of(layer: nn.Module, keep: Keep, ops: Operations) -> Any:
    own = layer.forward

    def forward(
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **extra: Any,
    ) -> Any:
        is_usual = position_embeddings is not None and (attention_mask is None or attention_mask.ndim == 4)
        autocast = torch.is_autocast_enabled(hidden_states.device.type)
        if not is_usual or past_key_values is not None or autocast:
            extra |= {"attention_mask": attention_mask, "past_key_values": past_key_values}
            return own(hidden_states, position_embeddings=position_embeddings, **extra)
        assert position_embeddings is not None
        rotation = Rotation(*position_embeddings, attention_mask)
        return run_block(layer, hidden_states, rotation, keep=keep, operations=ops)

    return forward


def _agrees(layer: nn.Module) -> bool:
    """Whether outputs and input gradients of the block are those of the layer's own forward."""
    modules: Any = layer
    weight = modules.input_layernorm.weight
    generator = torch.Generator().manual_seed(0)
    shape = (2, PROBE_SLOTS, len(weight))
    x = torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
    angles = torch.rand(1, PROBE_SLOTS, modules.self_attn.head_dim // 2, generator=generator).to(
        weight.device
    )
    angles = torch.cat([angles, angles], -1)
    cosine, sine = angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)
    rotation = Rotation(cosine, sine, None)
    dropping = [m for m in layer.modules() if isinstance(m, LoRALayer) and m.training]
    for module in dropping:
        module.training = False
    try:
        with whole(layer):
            fast = _output_and_gradient(
                lambda h: run_block(layer, h, rotation, keep="all", operations=_operations_of(layer)), x
            )
        # Its own last: hooks on the layer, which the block passes by, leave it as they want it.
        own = _output_and_gradient(lambda h: layer(h, position_embeddings=(cosine, sine)), x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    finally:
        for module in dropping:
            module.training = True
    # Rounding differs by a few last places (transformers' norms are float32 even in a float64 model);
    # another norm, scale or residual differs by far more.
    tolerance = 64 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
    return all(bool((a - b).norm() <= tolerance * b.norm()) for a, b in zip(fast, own, strict=True))


def _output_and_gradient(function: Any, x: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y = y[0] if isinstance(y, tuple) else y
        (gradient,) = torch.autograd.grad(y.float().square().sum(), leaf)
    return [(y.detach() - x).double(), gradient.double()]
