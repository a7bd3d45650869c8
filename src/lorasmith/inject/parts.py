"""LoRA on parts of a fused layer, such as q and v of a fused q, k, v (`enable_lora` of microsoft/LoRA).

Each part has its own A and B. Stacked, they are one pair of rank parts · r whose B is zero outside
its blocks, so the layer computes on the lean path, and PEFT's format holds it exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from lorasmith.inject.layer import LoRALayer, lora_outputs, shape_of
from lorasmith.lora import Span, gather, spread


class LoRAParts(LoRALayer):
    """`lora_B_parts` (Σ rows, r) trains; `lora_B`, with its zeros, is made from it for each use."""

    lora_B_parts: nn.Parameter
    lora_spans: tuple[Span, ...]

    name_of_B = "lora_B_parts"

    @property
    def lora_B(self) -> nn.Parameter:  # type: ignore[override]
        """B (out_features, parts · r), differentiable with respect to its blocks."""
        spread_out = spread(self.lora_B_parts, self.lora_spans, shape_of(self).out_features)
        return cast(nn.Parameter, spread_out)

    @property
    def lora_is_plain(self) -> bool:
        """Not for grouping, which watches parameters."""
        return False

    def _add_to_base(self, x: Tensor) -> Tensor:
        return lora_outputs([self], x)[0]

    def stored_B(self, B: Tensor) -> Tensor:
        """The blocks of B."""
        return gather(B, self.lora_spans)


def spans_fault(spans: Sequence[Span], out_features: int) -> str | None:
    """Why a layer with `out_features` rows has no such parts."""
    if spans and spans[-1][1] > out_features:
        return f"a part ends at row {spans[-1][1]}, the layer has {out_features}"
    return None
