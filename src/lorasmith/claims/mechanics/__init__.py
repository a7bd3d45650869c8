"""Claims about LoRA's mechanics: identities, bytes, seconds. No quality of a trained model is in them."""

from __future__ import annotations

from lorasmith.claims.claim import Claim
from lorasmith.claims.mechanics.algebra import FOLD, FULL_RANK
from lorasmith.claims.mechanics.disk import HUNDRED, RATIO
from lorasmith.claims.mechanics.latency import APART_LATENCY, BOTTLENECK_LATENCY, MERGED_LATENCY
from lorasmith.claims.mechanics.memory import MEMORY
from lorasmith.claims.mechanics.prefix import PREFIX
from lorasmith.claims.mechanics.start import FROZEN, IDENTITY
from lorasmith.claims.mechanics.steps import STEP_TIME
from lorasmith.claims.mechanics.switching import DRIFT, SWITCH

MECHANICS: tuple[Claim, ...] = (
    IDENTITY, FROZEN, FULL_RANK, FOLD,
    MERGED_LATENCY, APART_LATENCY, BOTTLENECK_LATENCY, PREFIX,
    SWITCH, DRIFT,
    MEMORY, RATIO, HUNDRED, STEP_TIME,
)  # fmt: skip

__all__ = ["MECHANICS"]
