"""Corpus scores of outputs against one or several references each.

References are one string, or a sequence of strings, per output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lorasmith.errors import DataError

References = Sequence[str] | Sequence[Sequence[str]]


def bleu(outputs: Sequence[str], references: References) -> float:
    """BLEU of the corpus in 0…100, lowercased, the 13a tokenizer: what `bleu_signature` says.

    Equals the official E2E scorer to four digits; cased it would be about 4 points lower there.
    """
    return float(_bleu_metric().corpus_score(list(outputs), _columns(outputs, references)).score)


def bleu_signature(references: References | None = None) -> str:
    """Return sacrebleu's signature of `bleu`, version included, to be printed beside every score.

    It names the number of references; without any given it says `nrefs:var`.
    """
    references = [["a"], ["a", "a"]] if references is None else references
    outputs = ["a"] * len(references)
    metric = _bleu_metric()
    metric.corpus_score(outputs, _columns(outputs, references))
    return str(metric.get_signature())


def chrf(outputs: Sequence[str], references: References) -> float:
    """chrF2 of the corpus in 0…100: the F-score of character n-grams, n = 1…6, cased."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score(list(outputs), _columns(outputs, references)).score)


def exact_match(outputs: Sequence[str], references: References) -> float:
    """Share, in 0…1, of the outputs that equal one of their references but for space around them."""
    return _share(outputs, references, str.strip)


def accuracy(outputs: Sequence[str], references: References) -> float:
    """Share, in 0…1, of the labels that are right; case and space around a label do not count."""
    return _share(outputs, references, lambda label: label.strip().casefold())


def _share(outputs: Sequence[str], references: References, normal: Callable[[str], str]) -> float:
    rows = _rows(outputs, references)
    hits = [normal(o) in {normal(r) for r in row} for o, row in zip(outputs, rows, strict=True)]
    return sum(hits) / len(hits)


def _bleu_metric() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(lowercase=True)


def _columns(outputs: Sequence[str], references: References) -> list[list[str | None]]:
    """Transpose to one list per reference number; short rows are padded with None, as sacrebleu wants."""
    rows = _rows(outputs, references)
    width = max(len(row) for row in rows)
    return [[row[i] if i < len(row) else None for row in rows] for i in range(width)]


def _rows(outputs: Sequence[str], references: References) -> list[list[str]]:
    if isinstance(outputs, str) or isinstance(references, str):
        raise DataError("Outputs and references are lists with one entry for each record, not one string.")
    rows = [[given] if isinstance(given, str) else list(given) for given in references]
    if not outputs or len(outputs) != len(rows):
        raise DataError(f"{len(outputs)} outputs cannot be scored against {len(rows)} sets of references.")
    bare = [number for number, row in enumerate(rows, start=1) if not row]
    if bare:
        raise DataError(f"{len(bare)} outputs have no reference, the first is number {bare[0]}.")
    return rows
