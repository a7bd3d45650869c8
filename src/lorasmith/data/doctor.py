"""What the model will really be trained on, and everything that looks wrong about it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lorasmith.data.duplicates import duplicates, overlap
from lorasmith.data.encode import Encoded, Example, Stats, encode
from lorasmith.data.labels import label_counts, odd_labels
from lorasmith.data.records import Problem, Record, RecordSet, read_records
from lorasmith.data.template import Specials, Tokenizer, render_prompt, specials_of
from lorasmith.data.texts import odd_languages, odd_texts
from lorasmith.errors import DataError

COMPARED_WITH_SERVING = 200
VIEWS = 4

Pieces = list[tuple[str, bool]]
"""Text of each token, and whether it carries loss."""


@dataclass(frozen=True, slots=True)
class View:
    """One example as the model sees it."""

    line: int
    why: str
    pieces: Pieces


@dataclass(frozen=True, slots=True)
class Report:
    """The answer of `check`.

    Attributes:
        preview: the first example token by token: (text, is supervised).
        views: the first, the longest, the shortest and one with a problem.
        lengths: (tokens, tokens that carry loss) of each example.
        labels: how often each answer comes, where the data looks like classification.
    """

    records: int
    supervised_tokens: int
    problems: list[Problem]
    stats: Stats
    preview: Pieces
    views: list[View] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    labels: Mapping[str, int] | None = None


def check(
    source: str | os.PathLike[str] | Iterable[Any],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    against: str | os.PathLike[str] | Iterable[Any] | None = None,
) -> Report:
    """Read and encode a source as training would, and gather every problem in the order of its lines.

    Args:
        against: held-out records, which should share no question with the source.

    Raises:
        DataError: nothing in the source can be used, or nothing would carry loss.
    """
    found = read_records(source)
    encoded = encode(found, tokenizer, max_length=max_length)
    specials = specials_of(tokenizer)
    other = None if against is None else read_records(against)
    problems = [
        *found.problems,
        *encoded.problems,
        *duplicates(found.records),
        *odd_texts(found.records, specials),
        *odd_languages(found.records),
        *odd_labels(found.records),
        *_odd_tokens(encoded.examples, tokenizer, specials),
        *_unlike_serving(found.records, encoded.examples, tokenizer, specials),
        *(() if other is None else overlap(found.records, other.records, os.path.basename(other.source))),
    ]
    problems = sorted(_without_repeats(problems), key=lambda p: p.line)
    return Report(
        records=len(found),
        supervised_tokens=encoded.stats.supervised_tokens,
        problems=problems,
        stats=encoded.stats,
        preview=_pieces(encoded.examples[0], tokenizer),
        views=_views(encoded.examples, problems, tokenizer),
        lengths=[(len(e), int(e.supervised.sum())) for e in encoded.examples],
        labels=label_counts(found.records),
    )


def refuse_systematic(found: RecordSet, encoded: Encoded, tokenizer: Tokenizer) -> None:
    """Refuse data that is wrong through and through, judged by its first records.

    Raises:
        DataError: most of them have a doubled control token, no end of turn, or other tokens before their answer
            than serving would start from.
    """
    specials, sample = specials_of(tokenizer), encoded.examples[:COMPARED_WITH_SERVING]
    lines = {example.line for example in sample}
    records = [record for record in found.records if record.line in lines]
    by_kind: dict[str, dict[int, Problem]] = {}
    for problem in (
        *_odd_tokens(sample, tokenizer, specials),
        *_unlike_serving(records, sample, tokenizer, specials),
    ):
        by_kind.setdefault(problem.kind, {}).setdefault(problem.line, problem)
    for kind, problems in by_kind.items():
        if 2 * len(problems) > len(lines):
            first = next(iter(problems.values()))
            raise DataError(
                f"{len(problems)} of the first {len(lines)} records have the same fault ({kind}), so the run would "
                f"learn it.\n  line {first.line}: {first.message}\n  `lorasmith data check` shows them token by token."
            )


def _without_repeats(problems: Iterable[Problem]) -> list[Problem]:
    """Keep the first problem of each kind on each line."""
    kept: dict[tuple[int, str], Problem] = {}
    for problem in problems:
        kept.setdefault((problem.line, problem.kind), problem)
    return list(kept.values())


def _pieces(example: Example, tokenizer: Tokenizer) -> Pieces:
    return [
        (str(tokenizer.decode([int(token)])), bool(mask))
        for token, mask in zip(example.tokens, example.supervised, strict=True)
    ]


def _views(examples: Sequence[Example], problems: Sequence[Problem], tokenizer: Tokenizer) -> list[View]:
    bad = {p.line for p in problems}
    chosen = {
        "the first": examples[0],
        "the longest": max(examples, key=len),
        "the shortest": min(examples, key=len),
        "the first with a problem": next((e for e in examples if e.line in bad), examples[0]),
    }
    views: dict[int, View] = {}
    for why, example in chosen.items():
        views.setdefault(id(example), View(example.line, why, _pieces(example, tokenizer)))
    return list(views.values())


def _odd_tokens(examples: Sequence[Example], tokenizer: Tokenizer, specials: Specials) -> Iterator[Problem]:
    last = {example.line: example for example in examples}  # a text may have several chunks
    for example in examples:
        doubled = _doubled(example, specials.ids)
        if doubled is not None:
            text = f"the control token {tokenizer.decode([doubled])!r} comes twice in a row"
            yield Problem(example.line, "doubled-token", text, is_dropped=False)
        if last[example.line] is example and int(example.tokens[-1]) not in specials.ids:
            text = "no end-of-turn token closes it: the model would not learn where to stop"
            yield Problem(example.line, "end-of-turn", text, is_dropped=False)


def _doubled(example: Example, specials: frozenset[int]) -> int | None:
    tokens = [int(token) for token in example.tokens]
    return next((a for a, b in pairwise(tokens) if a == b and a in specials), None)


def _unlike_serving(
    records: Sequence[Record], examples: Sequence[Example], tokenizer: Tokenizer, specials: Specials
) -> Iterator[Problem]:
    """Where the tokens before the last answer are not those that serving would start from."""
    whole = {example.line: example for example in examples if not example.truncated}
    compared = 0
    for record in records:
        if record.kind == "text":
            yield from _hand_rendered(record, tokenizer, specials)
        elif record.line in whole and compared < COMPARED_WITH_SERVING:
            compared += 1
            try:
                served = render_prompt(record, tokenizer)
            except DataError as error:
                yield Problem(record.line, "template-mismatch", f"serving fails: {error}", is_dropped=False)
                continue
            if whole[record.line].tokens[: len(served)].tolist() != served:
                text = "serving would start from other tokens than those before its last answer"
                yield Problem(record.line, "template-mismatch", text, is_dropped=False)


def _hand_rendered(record: Record, tokenizer: Tokenizer, specials: Specials) -> Iterator[Problem]:
    """A text with control tokens in it was rendered already: by this base's template, and closed?"""
    used = [s for s in specials.texts if s in record.text]
    if not used or not tokenizer.chat_template:
        return
    message = [{"role": "user", "content": "x"}]
    closed = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=False))
    opened = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))[
        len(closed) :
    ]
    if opened.strip() and opened.strip() not in record.text:
        text = f"rendered by hand without {opened.strip()!r}, with which serving opens an answer"
        yield Problem(record.line, "template-mismatch", text, is_dropped=False)
        return
    starts = [s for s in specials.texts if opened.startswith(s)]
    ends = [s for s in specials.texts if s in closed and s not in starts]
    if starts and ends and record.text.count(starts[0]) > record.text.count(ends[0]):
        text = f"{record.text.count(starts[0])} turns open with {starts[0]!r}, {record.text.count(ends[0])} close with {ends[0]!r}"
        yield Problem(record.line, "end-of-turn", text, is_dropped=False)
