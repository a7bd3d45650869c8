"""The paper's claims, measured again on a model of your own: each a design, an expectation, a verdict.

May import: bases, lora, data, scoring, baselines, train, engine, errors.
"""

from __future__ import annotations

from lorasmith.claims.claim import Claim, Holds, Measured, Setting

__all__ = ["Claim", "Holds", "Measured", "Setting"]
