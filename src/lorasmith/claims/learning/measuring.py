"""Loss of a base on held-out records, as it is or with an adapter on."""

from __future__ import annotations

from collections.abc import Sequence

from lorasmith.bases import Base
from lorasmith.data import Example, encode, read_records
from lorasmith.inject import eject, inject
from lorasmith.lora import Adapter
from lorasmith.train import Forward, choose_layout, evaluate_loss


def encoded(base: Base, records: Sequence[dict[str, str]]) -> list[Example]:
    """The records as tokens."""
    return encode(read_records(records), base.tokenizer, max_length=1024).examples


def held_out_loss(base: Base, examples: Sequence[Example], adapter: Adapter | None = None) -> float:
    """Nats per supervised token; the base is afterwards as it was."""
    if adapter is not None:
        inject(base.model, adapter)
    try:
        forward = Forward(base.model)
        longest = max(map(len, examples))
        order = [list(range(len(examples)))]
        layout = choose_layout("auto", examples, order, can_mask=forward.can_mask(longest), dropout=0.0)
        return evaluate_loss(forward, examples, layout=layout).loss
    finally:
        if adapter is not None:
            eject(base.model)
