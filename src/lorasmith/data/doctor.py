"""What the model will really be trained on, and everything that looks wrong about it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lorasmith.data.encode import Example, Stats, encode
from lorasmith.data.records import Problem, Record, read_records
from lorasmith.data.template import Specials, Tokenizer, as_messages, specials_of


@dataclass(frozen=True, slots=True)
class Report:
    """The answer of `check`. `preview` shows the first example token by token: (text, is supervised)."""

    records: int
    supervised_tokens: int
    problems: list[Problem]
    stats: Stats
    preview: list[tuple[str, bool]]


def check(source: str | os.PathLike[str] | Iterable[Any], tokenizer: Tokenizer, *, max_length: int) -> Report:
    """Read and encode a source as training would, and gather every problem in the order of its lines.

    Raises:
        DataError: nothing in the source can be used, or nothing would carry loss.
    """
    found = read_records(source)
    encoded = encode(found, tokenizer, max_length=max_length)
    specials = specials_of(tokenizer)
    problems = [
        *found.problems,
        *encoded.problems,
        *_duplicates(found.records),
        *_odd_texts(found.records, specials),
        *_odd_tokens(encoded.examples, tokenizer, specials),
    ]
    first = encoded.examples[0]
    preview = [
        (str(tokenizer.decode([int(token)])), bool(mask))
        for token, mask in zip(first.tokens, first.supervised, strict=True)
    ]
    problems = sorted(_without_repeats(problems), key=lambda p: p.line)
    return Report(len(found), encoded.stats.supervised_tokens, problems, encoded.stats, preview)


def _without_repeats(problems: Iterable[Problem]) -> list[Problem]:
    """Keep the first problem of each kind on each line."""
    kept: dict[tuple[int, str], Problem] = {}
    for problem in problems:
        kept.setdefault((problem.line, problem.kind), problem)
    return list(kept.values())


def _duplicates(records: Sequence[Record]) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for record in records:
        key = repr((record.kind, _parts(record)))
        if key in seen:
            text = f"the same as line {seen[key]}"
            yield Problem(record.line, "duplicate", text, is_dropped=False)
        seen.setdefault(key, record.line)


def _odd_texts(records: Sequence[Record], specials: Specials) -> Iterator[Problem]:
    for record in records:
        parts = _parts(record)
        empty = [name for name, text in parts if not text.strip()]
        if empty:
            text = f"the {empty[0]} turn is empty"
            yield Problem(record.line, "empty-turn", text, is_dropped=False)
        markup = [s for _, text in parts for s in specials.texts if s in text]
        if markup and record.kind != "text":  # a text may well be rendered already
            text = f"the text holds {markup[0]!r}, which becomes a control token"
            yield Problem(record.line, "special-token", text, is_dropped=False)


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


def _parts(record: Record) -> list[tuple[str, str]]:
    if record.kind == "text":
        return [("text", record.text)]
    return [(m["role"], m["content"]) for m in as_messages(record)[0]]
