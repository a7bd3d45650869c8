from __future__ import annotations

import math

import pytest
import sacrebleu

from lorasmith.errors import DataError
from lorasmith.scoring import accuracy, bleu, bleu_signature, chrf, exact_match

FIVE = "one two three four five"


def test_identical_outputs_score_100() -> None:
    assert bleu([FIVE, "a b c d"], [FIVE, "a b c d"]) == pytest.approx(100)
    assert chrf([FIVE], [FIVE]) == pytest.approx(100)


def test_bleu_ignores_case() -> None:
    assert bleu([FIVE.upper()], [[FIVE]]) == pytest.approx(100)


def test_brevity_penalty_by_hand() -> None:
    # All n-grams of the four words occur, so the score is 100·exp(1 - 5/4).
    assert bleu(["one two three four"], [[FIVE]]) == pytest.approx(100 * math.exp(1 - 5 / 4))


def test_modified_precision_by_hand() -> None:
    # 4 of 5 unigrams, 3 of 4 bigrams, 2 of 3 trigrams and 1 of 2 four-grams; equal lengths.
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu(["one two three four six"], [[FIVE]]) == pytest.approx(expected)


def test_the_closest_reference_counts_and_short_rows_are_padded() -> None:
    other = "six seven eight nine ten"
    assert bleu([other, FIVE], [[FIVE, other], [FIVE]]) == pytest.approx(100)
    assert bleu([FIVE, other], [[FIVE], [FIVE, other]]) == pytest.approx(100)


def test_bleu_is_over_the_corpus_and_not_a_mean() -> None:
    # 5 + 4 words against 5 + 5: 8 of 9, 6 of 7, 4 of 5, 2 of 3, and one brevity penalty.
    outputs, expected = [FIVE, "one two three six"], (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25
    assert bleu(outputs, [FIVE, FIVE]) == pytest.approx(100 * math.exp(1 - 10 / 9) * expected)


def test_the_signature_says_what_was_computed() -> None:
    version = f"version:{sacrebleu.__version__}"
    assert bleu_signature([["a"], ["b"]]) == f"nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|{version}"
    assert bleu_signature() == bleu_signature([["a", "b"], ["c"]])
    assert bleu_signature().startswith("nrefs:var|")


def test_chrf_with_several_references_by_hand() -> None:
    # One character: only n = 1 counts, and the better reference is a full match.
    assert chrf(["a"], [["b", "a"]]) == pytest.approx(100)
    assert chrf(["a"], ["b"]) == 0


def test_exact_match_and_accuracy() -> None:
    assert exact_match([" a", "B", "c"], [["x", "a"], ["b"], ["c "]]) == pytest.approx(2 / 3)
    assert accuracy([" Straße\n", "B", "c"], ["STRASSE", "b", "d"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("score", [bleu, chrf, exact_match, accuracy])
def test_what_cannot_be_scored(score: object) -> None:
    assert callable(score)
    for outputs, references in (([], []), (["a"], []), (["a"], [[]]), ("a", ["a"]), (["a"], "a")):
        with pytest.raises(DataError):
            score(outputs, references)
