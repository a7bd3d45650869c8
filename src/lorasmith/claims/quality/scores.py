"""What each task's answers are worth: every metric, and the one of the verdict item by item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorasmith import scoring
from lorasmith.claims.quality.arms import Rows
from lorasmith.claims.quality.statistics import Items

Scores = Mapping[str, Callable[[Sequence[str], Rows], float | None]]


@dataclass(frozen=True)
class Measure:
    """How a task is scored.

    Attributes:
        headline: the metric of the verdict, one of `scores`; in 0…100, more is better.
        items: outputs → numbers of each item; `total` makes the headline of their sums.
        scores: every metric, by name.
    """

    headline: str
    items: Callable[[Sequence[str], Rows], Items]
    total: Callable[[Any], float]
    scores: Scores

    def all(self, outputs: Sequence[str], rows: Rows) -> dict[str, float]:
        """Every metric that there is something for, rounded to six digits behind the point."""
        found = {name: score(outputs, rows) for name, score in self.scores.items()}
        return {name: round(value, 6) for name, value in found.items() if value is not None}


def _references(rows: Rows) -> list[list[str]]:
    return [row["references"] for row in rows]


def _bleu_items(outputs: Sequence[str], rows: Rows) -> Items:
    """Of each: hits and n-grams by order, own length, length of the nearest reference."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(lowercase=True, effective_order=True)
    found = [metric.sentence_score(o, r) for o, r in zip(outputs, _references(rows), strict=True)]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in found], dtype=np.float64)


def _bleu_total(sums: Any) -> float:
    from sacrebleu.metrics import BLEU

    counts, lengths = [int(x) for x in sums[:8]], [int(x) for x in sums[8:]]
    return float(BLEU.compute_bleu(counts[:4], counts[4:], *lengths, smooth_method="exp").score)


def _in_scope_items(outputs: Sequence[str], rows: Rows) -> Items:
    def one(output: str, row: Mapping[str, Any]) -> tuple[float, float]:
        hit = scoring.in_scope_accuracy([output], [row["completion"]])
        return (0.0, 0.0) if hit is None else (hit, 1.0)

    return np.array([one(o, row) for o, row in zip(outputs, rows, strict=True)])


def _form_items(outputs: Sequence[str], rows: Rows) -> Items:
    hits = [scoring.is_same_form(o, row["completion"]) for o, row in zip(outputs, rows, strict=True)]
    return np.array([[float(hit), 1.0] for hit in hits])


def _percent(sums: Any) -> float:
    return float(100 * sums[0] / sums[1]) if sums[1] else 0.0


def _labels(rows: Rows) -> list[str]:
    return [row["completion"] for row in rows]


def _hundred(share: float | None) -> float | None:
    return None if share is None else 100 * share


E2E: Scores = {
    "BLEU": lambda o, rows: scoring.bleu(o, _references(rows)),
    "NIST": lambda o, rows: scoring.nist(o, _references(rows)),
    "ROUGE-L": lambda o, rows: 100 * scoring.rouge_l(o, _references(rows)),
    "CIDEr": lambda o, rows: scoring.cider(o, _references(rows)),
    "chrF": lambda o, rows: scoring.chrf(o, _references(rows)),
    "slot errors %": lambda o, rows: 100 * scoring.slot_error_rate(o, [row["prompt"] for row in rows]),
}
CLINC: Scores = {
    "in-scope accuracy %": lambda o, rows: _hundred(scoring.in_scope_accuracy(o, _labels(rows))),
    "out-of-scope recall %": lambda o, rows: _hundred(scoring.out_of_scope_recall(o, _labels(rows))),
}
SQL: Scores = {
    "logical form %": lambda o, rows: 100 * scoring.logical_form_accuracy(o, _labels(rows)),
    "valid SQL %": lambda o, rows: 100 * scoring.valid_sql_rate(o, [row["columns"] for row in rows]),
}
MEASURES = {
    "e2e": Measure("BLEU", _bleu_items, _bleu_total, E2E),
    "clinc150": Measure("in-scope accuracy %", _in_scope_items, _percent, CLINC),
    "wikisql": Measure("logical form %", _form_items, _percent, SQL),
}
