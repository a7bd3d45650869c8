"""A causal language model as body and head, found by asking the model and proved by a probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.train.loss import Head

PROBE_LENGTH = 8


@dataclass(frozen=True)
class Parts:
    """`body(input_ids, …)` gives hidden states (batch, length, d); `head` turns them into logits."""

    body: Callable[..., Tensor]
    head: Head


def split_model(model: nn.Module) -> Parts | None:
    """Body and head of `model`, or None where head(body(x)) is not the model's own logits.

    Nothing is assumed of the architecture: the candidates are tried on a few tokens, with the
    logit scale and the soft cap that the config names, and must reproduce the logits.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    module = get_head() if callable(get_head) else None
    body = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    if not isinstance(module, nn.Module) or not isinstance(body, nn.Module):
        return None
    parts = Parts(_hidden_states(body), _head(module, getattr(model, "config", None)))
    return parts if _reproduces(model, parts, vocabulary_of(module)) else None


def vocabulary_of(head: nn.Module) -> int:
    """Rows of the output layer."""
    return int(head.get_parameter("weight").shape[0])


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The longest list of modules of one class: the decoder layers."""
    lists = [
        list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1
    ]
    return max(lists, key=len, default=[])


def _hidden_states(body: nn.Module) -> Callable[..., Tensor]:
    def run(input_ids: Tensor, **kwargs: Any) -> Tensor:
        hidden: Tensor = body(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
        return hidden

    return run


def _head(module: nn.Module, config: Any) -> Head:
    divisor = getattr(config, "logits_scaling", None)  # Granite
    factor = getattr(config, "logit_scale", None)  # Cohere
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    scale = 1.0 / divisor if divisor else float(factor or 1.0)
    return Head(module, scale, float(softcap) if softcap else None)


@torch.no_grad()
def _reproduces(model: nn.Module, parts: Parts, vocabulary: int) -> bool:
    weight = parts.head.module.get_parameter("weight")
    ids = torch.arange(PROBE_LENGTH, device=weight.device)[None] * 7 % vocabulary
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        found = parts.head.logits(parts.body(ids)[0]).float()
    except (TypeError, AttributeError, RuntimeError):
        return False
    finally:
        for module in was_training:  # each its own: LoRA layers train inside a base that does not
            module.training = True
    tolerance = 4 * torch.finfo(weight.dtype).eps * expected.abs().max().item()
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance)
