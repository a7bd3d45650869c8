"""Records that say the same: exactly, nearly, or in the file that is meant to test what was learned."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lorasmith.data.records import Problem, Record
from lorasmith.data.template import as_messages

SHINGLE_WORDS = 3
LEAST_SHINGLES = 20
NEAR = 0.9
"""Share of common shingles (Jaccard) from which two texts are called nearly the same. Filled-in templates
reach 0.88 with one slot changed, and they are no fault."""

HASHES, BANDS = 64, 16
COMPARED_PER_BUCKET = 8
_PRIME = np.uint64((1 << 61) - 1)


def duplicates(records: Sequence[Record]) -> Iterator[Problem]:
    """Records that repeat an earlier one, exactly or nearly; each is named once."""
    exact: dict[str, int] = {}
    first: list[Record] = []
    for record in records:
        key = repr((record.kind, parts(record)))
        if key in exact:
            yield Problem(record.line, "duplicate", f"the same as line {exact[key]}", is_dropped=False)
        else:
            exact[key] = record.line
            first.append(record)
    for a, b, share in _near_pairs([_Text.of(r) for r in first], None):
        how = "differs only in case, spaces or punctuation" if share == 1 else f"{share:.0%} the same"
        text = f"nearly the same as line {first[a].line}: {how}"
        yield Problem(first[b].line, "near-duplicate", text, is_dropped=False)


def overlap(records: Sequence[Record], other: Sequence[Record], name: str) -> Iterator[Problem]:
    """Records whose question, or whole text, also stands in the file held out."""
    questions = {normal(question(r)): r.line for r in other if question(r).strip()}
    left = []
    for record in records:
        line = questions.get(normal(question(record)))
        if line is not None:
            text = f"its prompt is also on line {line} of {name}: a score there would measure memory"
            yield Problem(record.line, "overlap", text, is_dropped=False)
        else:
            left.append(record)
    for a, b, share in _near_pairs([_Text.of(r) for r in other], [_Text.of(r) for r in left]):
        text = f"{share:.0%} the same as line {other[a].line} of {name}"
        yield Problem(left[b].line, "overlap", text, is_dropped=False)


def parts(record: Record) -> list[tuple[str, str]]:
    """(role, text) of each turn."""
    if record.kind == "text":
        return [("text", record.text)]
    return [(m["role"], m["content"]) for m in as_messages(record)[0]]


def question(record: Record) -> str:
    """All that stands before the last answer; of a plain text, the text."""
    if record.kind == "text":
        return record.text
    turns = parts(record)
    last = max(i for i, (role, _) in enumerate(turns) if role == "assistant")
    return "\n".join(text for _, text in turns[:last])


def normal(text: str) -> str:
    """Lower case, one space between words, no punctuation."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


class _Text:
    """A record's `text` and `question` as they are, its words, their shingles, and the numbers in it."""

    __slots__ = ("numbers", "question", "shingles", "text", "whole")

    def __init__(self, question: str, text: str) -> None:
        self.question, self.text, self.whole = question, text, normal(text)
        whole = self.whole
        words = whole.split()
        found = {
            " ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))
        }
        self.shingles = frozenset(zlib.crc32(s.encode()) for s in found)
        self.numbers = tuple(re.findall(r"\d+", whole))

    @classmethod
    def of(cls, record: Record) -> _Text:
        return cls(question(record), "\n".join(text for _, text in parts(record)))


def _near_pairs(known: Sequence[_Text], new: Sequence[_Text] | None) -> Iterator[tuple[int, int, float]]:
    """(index in `known`, index in `new`, share) for each new text that is near an earlier one.

    Without `new`, `known` is compared with itself. Several answers to one question are no duplicates.
    """
    others = known if new is None else new
    buckets: dict[tuple[int, bytes], list[int]] = {}
    marks = [_bands(text) for text in known]
    if new is not None:
        for i, bands in enumerate(marks):
            for key in bands:
                buckets.setdefault(key, []).append(i)
    for j, text in enumerate(others):
        bands = marks[j] if new is None else _bands(text)
        candidates = sorted({i for key in bands for i in buckets.get(key, [])[:COMPARED_PER_BUCKET]})
        best = max(((_share(known[i], text), -i) for i in candidates), default=(0.0, 0))
        if best[0] >= NEAR:
            yield -best[1], j, best[0]
        if new is None:
            for key in bands:
                buckets.setdefault(key, []).append(j)


def _share(a: _Text, b: _Text) -> float:
    if a.question == b.question and a.question != a.text:
        return 0.0  # several answers to one question are meant
    if a.whole == b.whole:
        return 1.0
    if min(len(a.shingles), len(b.shingles)) < LEAST_SHINGLES or a.numbers != b.numbers:
        return 0.0
    return len(a.shingles & b.shingles) / len(a.shingles | b.shingles)


def _bands(text: _Text) -> list[tuple[int, bytes]]:
    """Keys under which a text finds those that are probably near: bands of its MinHash signature."""
    hashes = np.fromiter(text.shingles, dtype=np.uint64, count=len(text.shingles))
    signature = ((_A[:, None] * hashes[None] + _B[:, None]) % _PRIME).min(axis=1)
    rows = HASHES // BANDS
    return [(k, signature[k * rows : (k + 1) * rows].tobytes()) for k in range(BANDS)]


def _coefficients(seed: int) -> npt.NDArray[np.uint64]:
    # Below 2^29, so that a · 32-bit hash + b stays inside 64 bits.
    return np.random.PCG64(seed).random_raw(HASHES) % np.uint64(1 << 29) + np.uint64(1)


_A, _B = _coefficients(1), _coefficients(2)
