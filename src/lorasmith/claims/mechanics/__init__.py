"""Claims about LoRA's mechanics: identities, bytes, seconds. No quality of a trained model is in them."""

from __future__ import annotations

from lorasmith.claims.claim import Claim
from lorasmith.claims.mechanics.start import FROZEN, IDENTITY

MECHANICS: tuple[Claim, ...] = (IDENTITY, FROZEN)

__all__ = ["MECHANICS"]
