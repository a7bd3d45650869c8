"""Texts become scores.

May import: errors
"""

from __future__ import annotations

from lorasmith.scoring.metrics import accuracy, bleu, bleu_signature, chrf, exact_match

__all__ = ["accuracy", "bleu", "bleu_signature", "chrf", "exact_match"]
