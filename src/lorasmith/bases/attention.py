"""Another attention function in a model that lets one choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "lorasmith"
AttentionFunction = Callable[..., Any]
"""(q, k, v, mask, *, scale) to outputs, all (batch, heads, slots, d); k and v may have fewer heads."""


@contextmanager
def attention(model: nn.Module, function: AttentionFunction) -> Iterator[bool]:
    """Let `model` compute its causal self-attention by `function` inside the `with`.

    Calls that are anything else (another number of keys than queries, attention dropout, a bias or
    soft cap) still go to PyTorch's own. True is yielded where the model takes part: one of
    transformers' that computes attention by PyTorch's fused kernel now.
    """
    with _computing_by(model, NAME, lambda: _causal(function)) as takes_part:
        yield takes_part


@contextmanager
def attention_inputs(model: nn.Module, name: str) -> Iterator[bool]:
    """Let attention modules change what they attend to inside the `with`.

    A module with an attribute `name` has it called as (module, q, k, v, mask) → (k, v, mask), the mask
    booleans, additive or None; PyTorch's own attention then computes with those. True is yielded where
    the model takes part, as in `attention`.
    """
    with _computing_by(model, f"{NAME}-{name}", lambda: _changed_inputs(name)) as takes_part:
        yield takes_part


@contextmanager
def _computing_by(model: nn.Module, name: str, make: Callable[[], AttentionFunction]) -> Iterator[bool]:
    """Register what `make` returns as `name` and let `model` use it, if it is one that can."""
    given: Any = model
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or not hasattr(
        model, "set_attn_implementation"
    ):
        yield False
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, make())
    AttentionMaskInterface.register(name, sdpa_mask)
    given.set_attn_implementation(name)
    try:
        yield bool(given.config._attn_implementation == name)
    finally:
        given.set_attn_implementation("sdpa")


def _changed_inputs(name: str) -> AttentionFunction:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        change = getattr(module, name, None)
        if change is not None:
            key, value, attention_mask = change(module, query, key, value, attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    return forward


def _causal(function: AttentionFunction) -> AttentionFunction:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **extra: Any,
    ) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        plain = not dropout and all(extra.get(name) is None for name in ("position_bias", "softcap", "s_aux"))
        if not (causal and plain and query.shape[2] == key.shape[2]):
            options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **extra}
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        return function(query, key, value, attention_mask, scale=scale).transpose(1, 2), None

    return forward
