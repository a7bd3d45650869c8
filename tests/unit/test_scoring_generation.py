"""NIST, ROUGE-L and CIDEr against plain loops written from their definitions, and against small cases by hand."""

from __future__ import annotations

import math
import random
from itertools import chain

import numpy as np
import pytest

from lorasmith.errors import DataError
from lorasmith.scoring import cider, nist, rouge_l
from lorasmith.scoring.generation import mteval_words, words

WORDS = ["the", "a", "pub", "cheap", "river", "by", "near", "food", "good", "place"]
METRICS = (nist, rouge_l, cider)


def corpus(seed: int, n: int = 6) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)
    sentence = lambda: " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 12)))  # noqa: E731
    return [sentence() for _ in range(n)], [[sentence() for _ in range(rng.randint(1, 4))] for _ in range(n)]


def ngrams(text: str, n: int) -> list[str]:
    parts = text.split()
    return [" ".join(parts[i : i + n]) for i in range(len(parts) - n + 1)]


def nist_by_loops(outputs, references) -> float:
    """Doddington 2002 over all references' n-grams; a hit is clipped at the most any one reference has."""
    everything = [ref for row in references for ref in row]
    score = 0.0
    for n in range(1, 6):
        gained, given = 0.0, 0
        for output, row in zip(outputs, references, strict=True):
            grams = ngrams(output, n)
            given += len(grams)
            for gram in set(grams):
                hits = min(grams.count(gram), max(ngrams(ref, n).count(gram) for ref in row))
                if hits:
                    whole = sum(ngrams(ref, n).count(gram) for ref in everything)
                    before = gram.rpartition(" ")[0]
                    part = sum(
                        ngrams(ref, n - 1).count(before) if before else len(ref.split()) for ref in everything
                    )
                    gained += hits * math.log2(part / whole)
        score += gained / given
    ratio = sum(len(o.split()) for o in outputs) / sum(
        np.mean([len(ref.split()) for ref in row]) for row in references
    )
    return score * math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(min(ratio, 1.0)) ** 2)


def rouge_by_recursion(outputs, references) -> float:
    def common(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return 1 + common(a[:-1], b[:-1])
        return max(common(a[:-1], b), common(a, b[:-1]))

    found = []
    for output, row in zip(outputs, references, strict=True):
        o = output.split()[:6]
        lengths = [(common(o, r.split()[:6]), len(r.split()[:6])) for r in row]
        p, r = max(c for c, _ in lengths) / len(o), max(c / n for c, n in lengths)
        found.append((1 + 1.44) * p * r / (r + 1.44 * p) if p and r else 0.0)
    return float(np.mean(found))


def cider_by_vectors(outputs, references) -> float:
    """Vedantam et al. 2015, CIDEr-D: dense tf-idf vectors over every n-gram there is."""
    scores = np.zeros((len(outputs), 4))
    for n in range(1, 5):
        vocabulary = sorted({g for text in [*outputs, *chain(*references)] for g in ngrams(text, n)})
        documents = [sum(any(g in ngrams(r, n) for r in row) for row in references) for g in vocabulary]
        idf = np.log(len(references) / np.maximum(1, documents))
        vector = lambda text: np.array([ngrams(text, n).count(g) for g in vocabulary]) * idf  # noqa: B023, E731
        for i, (output, row) in enumerate(zip(outputs, references, strict=True)):
            for ref in row:
                o, r = vector(output), vector(ref)
                norm = np.linalg.norm(o) * np.linalg.norm(r)
                apart = len(output.split()) - len(ref.split())
                if norm:
                    scores[i, n - 1] += np.minimum(o, r) @ r / norm * math.exp(-(apart**2) / 72) / len(row)
    return 10 * float(scores.mean())


@pytest.mark.parametrize("seed", range(3))
def test_each_equals_plain_loops(seed):
    outputs, references = corpus(seed)
    assert nist(outputs, references) == pytest.approx(nist_by_loops(outputs, references), rel=1e-12)
    assert cider(outputs, references) == pytest.approx(cider_by_vectors(outputs, references), rel=1e-12)
    short = (
        [" ".join(o.split()[:6]) for o in outputs],
        [[" ".join(r.split()[:6]) for r in row] for row in references],
    )
    assert rouge_l(*short) == pytest.approx(rouge_by_recursion(outputs, references), rel=1e-12)


def test_nist_by_hand():
    # Two references "a b" and "a c": 4 words, a twice, b and c once. Output "a b": information of a is
    # log2(4/2) = 1, of b log2(4/1) = 2, of "a b" log2(2/1) = 1. (1 + 2) / 2 + 1 / 1 = 2.5; same length.
    # Longer n-grams: the scorer counts len - n + 1, nothing hits.
    assert nist(["a b"], [["a b", "a c"]]) == pytest.approx(2.5)


def test_rouge_by_hand():
    # LCS of "a b c d" and "a c x" is "a c": precision 2/4, recall 2/3.
    p, r = 2 / 4, 2 / 3
    assert rouge_l(["a b c d"], ["a c x"]) == pytest.approx((1 + 1.2**2) * p * r / (r + 1.2**2 * p))


def test_cider_by_hand():
    # Disjoint documents of four words each: every n-gram has idf ln 2, each cosine is 1, or 0 for another's.
    references = ["p q r s", "t u v w"]
    assert cider(references, references) == pytest.approx(10)
    assert cider(["p q r s", "p q r s"], references) == pytest.approx(5)


@pytest.mark.parametrize("metric", METRICS)
def test_properties(metric):
    outputs, references = corpus(5)
    perfect = [row[0] for row in references]
    score = metric(outputs, references)
    assert metric(perfect, references) > 1.5 * score  # an answer that is a reference beats random words
    assert metric([o.upper() for o in outputs], references) == pytest.approx(score)
    turned = [list(reversed(row)) for row in references]
    assert metric(outputs, turned) == pytest.approx(score)  # no reference comes first
    assert metric(outputs[::-1], references[::-1]) == pytest.approx(score)
    assert metric(["zzz"] * len(outputs), references) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_empty_outputs_score_nothing_and_mismatches_are_refused(metric):
    assert metric(["", ""], [["a b"], ["c"]]) == 0
    with pytest.raises(DataError, match="2 outputs cannot be scored against 1"):
        metric(["a", "b"], ["a"])


def test_nist_halves_at_two_thirds_of_the_references_length():
    # Only "a" hits: of 4 words given against 6 expected; at full length it is 6 words given, 1 hit in 6.
    references = [["a b c d e f"]]
    short, full = nist(["a x x x"], references), nist(["a x x x x x"], references)
    assert short / 6 * 4 == pytest.approx(full / 2)


def test_tokens():
    assert mteval_words("It's 3.5 stars, £20-25 (cheap).") == [
        "it's", "3.5", "stars", ",", "£20", "-", "25", "(", "cheap", ")", ".",
    ]  # fmt: skip
    assert words("A family-friendly pub, £20-25; it's 5-star!") == [
        "a", "family-friendly", "pub", "20-25", "it's", "5-star",
    ]  # fmt: skip
