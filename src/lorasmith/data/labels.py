"""Data that looks like classification: few short answers, each given many times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from lorasmith.data.duplicates import normal, parts, question
from lorasmith.data.records import Problem, Record

LONGEST_LABEL = 40  # characters
LEAST_PER_LABEL = 5
DOMINANT = 0.8
STARVED = 20
"""A label this many times rarer than the mean of the others is hardly learned."""


def label_counts(records: Sequence[Record]) -> Mapping[str, int] | None:
    """How often each label comes, or None where the answers are no labels."""
    answers = [_answer(record) for record in records]
    if not answers or any(a is None or len(a) > LONGEST_LABEL for a in answers):
        return None
    counts = Counter(a for a in answers if a is not None)
    if len(counts) < 2 or len(answers) < LEAST_PER_LABEL * len(counts):
        return None
    return dict(counts.most_common())


def odd_labels(records: Sequence[Record]) -> Iterator[Problem]:
    """One label for nearly everything, labels that hardly come, one question with two labels."""
    counts = label_counts(records)
    if counts is None:
        return
    first: dict[str, int] = {}
    for record in records:
        first.setdefault(_answer(record) or "", record.line)
    names = list(counts)
    top, total = names[0], sum(counts.values())
    if counts[top] >= DOMINANT * total:
        said = f"{counts[top]} of {total} answers are {top!r}: always saying it would score {counts[top] / total:.0%}"
        yield Problem(first[top], "imbalance", said, is_dropped=False)
    for name in names[1:]:
        mean = (total - counts[name]) / (len(names) - 1)
        if counts[name] * STARVED <= mean:
            said = f"the label {name!r} comes {counts[name]} times, the others {mean:.0f} times on average"
            yield Problem(first[name], "imbalance", said, is_dropped=False)
    yield from _conflicts(records)


def _conflicts(records: Sequence[Record]) -> Iterator[Problem]:
    seen: dict[str, Record] = {}
    for record in records:
        before = seen.setdefault(normal(question(record)), record)
        if _answer(before) != _answer(record):
            said = f"the same question has the label {_answer(before)!r} on line {before.line}, {_answer(record)!r} here"
            yield Problem(record.line, "conflict", said, is_dropped=False)


def _answer(record: Record) -> str | None:
    if record.kind == "text":
        return None
    return parts(record)[-1][1].strip()
