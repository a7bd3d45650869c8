"""Texts become scores.

May import: errors
"""

from __future__ import annotations

from lorasmith.scoring.generation import cider, nist, rouge_l
from lorasmith.scoring.intents import OUT_OF_SCOPE, in_scope_accuracy, out_of_scope_recall
from lorasmith.scoring.metrics import accuracy, bleu, bleu_signature, chrf, exact_match
from lorasmith.scoring.slots import slot_error_rate, slot_faults
from lorasmith.scoring.sql import (
    LogicalForm,
    is_same_form,
    is_valid_sql,
    logical_form,
    logical_form_accuracy,
    valid_sql_rate,
)

__all__ = [
    "OUT_OF_SCOPE",
    "LogicalForm",
    "accuracy",
    "bleu",
    "bleu_signature",
    "chrf",
    "cider",
    "exact_match",
    "in_scope_accuracy",
    "is_same_form",
    "is_valid_sql",
    "logical_form",
    "logical_form_accuracy",
    "nist",
    "out_of_scope_recall",
    "rouge_l",
    "slot_error_rate",
    "slot_faults",
    "valid_sql_rate",
]
