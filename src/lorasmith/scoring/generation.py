"""NIST, ROUGE-L and CIDEr of outputs against several references each, as the E2E challenge scored them.

Not the challenge's Java: texts are split by a regular expression where that used the PTB tokenizer (ROUGE-L,
CIDEr), and NIST is what its Python scorer computes, which weighs references otherwise than mteval's Perl does.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from lorasmith.scoring.metrics import References, _rows

Words = Sequence[str]
Grams = Counter[tuple[str, ...]]

NIST_ORDER = 5
NIST_BETA = -math.log(0.5) / math.log(1.5) ** 2
"""Half the score at two thirds of the references' length (mteval-13a)."""
ROUGE_BETA = 1.2
CIDER_ORDER, CIDER_SIGMA = 4, 6.0


def nist(outputs: Sequence[str], references: References) -> float:
    """NIST-5 of the corpus, lowercased: Σ_n (information of the n-grams that hit) / (n-grams given) × brevity.

    Information of an n-gram: log2(count of its first n-1 words / its own count), over all references.
    The formulas of pymteval (tuetschek/e2e-metrics, BSD 2-Clause, Ondrej Dusek), written anew.
    nltk's `corpus_nist` is another number.
    """
    rows = [[mteval_words(text) for text in row] for row in _rows(outputs, references)]
    given = [mteval_words(text) for text in outputs]
    counts: Grams = Counter()
    for row in rows:
        for words in row:
            counts[()] += len(words)
            for n in range(1, NIST_ORDER + 1):
                counts.update(_grams(words, n))
    total = sum(_nist_of_order(n, given, rows, counts) for n in range(1, NIST_ORDER + 1))
    average = sum(sum(map(len, row)) / len(row) for row in rows)
    return total * _nist_brevity(sum(map(len, given)) / average if average else 1.0)


def _nist_of_order(n: int, given: Sequence[Words], rows: Sequence[Sequence[Words]], counts: Grams) -> float:
    found, total = 0.0, 0
    for words, row in zip(given, rows, strict=True):
        own, most = _grams(words, n), _most(_grams(ref, n) for ref in row)
        found += sum(
            math.log2(counts[g[:-1]] / counts[g]) * min(k, most[g]) for g, k in own.items() if most[g]
        )
        total += len(words) - n + 1  # the scorer's own count, negative for outputs shorter than n - 1
    return found / total if total else 0.0


def _nist_brevity(ratio: float) -> float:
    if ratio >= 1:
        return 1.0
    return math.exp(-NIST_BETA * math.log(ratio) ** 2) if ratio > 0 else 0.0


def rouge_l(outputs: Sequence[str], references: References) -> float:
    """Mean ROUGE-L in 0…1: F with β = 1.2 of the best precision and the best recall over the references.

    coco-caption's formula, no PTB tokenizer. (`rouge-score` computes another ROUGE-L.)
    """
    rows = _rows(outputs, references)
    return sum(
        _rouge_l(words(o), [words(r) for r in row]) for o, row in zip(outputs, rows, strict=True)
    ) / len(rows)


def _rouge_l(output: Words, references: Sequence[Words]) -> float:
    common = [_common_length(output, ref) for ref in references]
    precision = max(common) / max(1, len(output))
    recall = max(length / max(1, len(ref)) for length, ref in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_length(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(row[j], before[j + 1]))
        before = row
    return before[-1]


def cider(outputs: Sequence[str], references: References) -> float:
    """Mean CIDEr-D: ten times the tf-idf cosine of clipped n-grams, n = 1…4, less for another length.

    Document frequencies come from these references, so scores of different test sets do not compare.
    coco-caption's formula, no PTB tokenizer.
    """
    rows = [[words(text) for text in row] for row in _rows(outputs, references)]
    seen: Grams = Counter()
    for row in rows:
        seen.update({gram for ref in row for n in _orders() for gram in _grams(ref, n)})
    scores = [_cider(words(o), row, seen, len(rows)) for o, row in zip(outputs, rows, strict=True)]
    return 10 * sum(scores) / len(scores)


def _cider(output: Words, references: Sequence[Words], seen: Grams, documents: int) -> float:
    def weights(text: Words, n: int) -> dict[tuple[str, ...], float]:
        return {g: k * math.log(documents / max(1, seen[g])) for g, k in _grams(text, n).items()}

    total = 0.0
    for ref in references:
        # coco-caption takes the number of bigrams for the length
        apart = max(0, len(output) - 1) - max(0, len(ref) - 1)
        near = math.exp(-(apart**2) / (2 * CIDER_SIGMA**2))
        total += sum(near * _clipped_cosine(weights(output, n), weights(ref, n)) for n in _orders())
    return total / CIDER_ORDER / len(references)


def _clipped_cosine(a: dict[tuple[str, ...], float], b: dict[tuple[str, ...], float]) -> float:
    norm = math.sqrt(sum(w * w for w in a.values()) * sum(w * w for w in b.values()))
    return sum(min(w, b.get(g, 0.0)) * b.get(g, 0.0) for g, w in a.items()) / norm if norm else 0.0


def words(text: str) -> list[str]:
    """Lowercased words and numbers, punctuation dropped: a light stand-in for coco-caption's PTB tokenizer."""
    return re.findall(r"[^\W_]+(?:['’.,-][^\W_]+)*", text.lower())


def mteval_words(text: str) -> list[str]:
    """Lowercased tokens as mteval-13a's basic tokenization has them."""
    for entity, char in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, char)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).lower().split()


def _orders() -> range:
    return range(1, CIDER_ORDER + 1)


def _grams(words: Words, n: int) -> Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _most(counts: Iterable[Grams]) -> Grams:
    most: Grams = Counter()
    for each in counts:
        most |= each
    return most
