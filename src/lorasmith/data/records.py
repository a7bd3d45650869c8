"""What a user hands in, row by row, becomes a `Record` or a `Problem`; nothing is skipped in silence.

`files.py` turns a source into numbered rows; here each row is checked and given its kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lorasmith.data.files import BadRowError, Row, rows_from_file
from lorasmith.errors import DataError, did_you_mean

Message = dict[str, str]
Kind = Literal["messages", "completion", "text"]

ROLES = ("system", "user", "assistant")
COLUMN_NAMES = ("messages", "prompt", "completion", "text")
COLUMNS = "`messages`, or `prompt` and `completion`, or `text`"
SHOWN_PROBLEMS = 5


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one record, and where it stands.

    `line` is the 1-based line of the file (JSONL, JSON, CSV, TSV) or the 1-based row (Parquet, Python).
    `is_dropped` says whether the record is left out because of it, or is used all the same.
    Kinds found while reading: encoding, json, csv, type, columns, role, empty-turn, no-assistant-turn;
    while encoding: template, end-of-turn, length, truncated, no-loss;
    by the doctor: duplicate, near-duplicate, overlap, empty-turn, special-token, encoding, control-character,
    invisible-character, mojibake, template-mismatch, language, imbalance, conflict, doubled-token, end-of-turn.
    """

    line: int
    kind: str
    message: str
    is_dropped: bool = True

    def __str__(self) -> str:
        return f"line {self.line}: {self.kind}: {self.message}"


@dataclass(frozen=True, slots=True)
class Record:
    """One usable record. Which attributes are set depends on `kind`:

    - "messages": `messages`; the first `context` of them are given and never carry loss;
    - "completion": `prompt` and `completion`;
    - "text": `text`.

    `fields` holds every other column as it was found.
    """

    kind: Kind
    line: int
    messages: tuple[Message, ...] = ()
    context: int = 0
    prompt: str = ""
    completion: str = ""
    text: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RecordSet:
    """The usable records of a source, in order, and what is wrong with the others."""

    records: list[Record]
    problems: list[Problem]
    source: str = "records"

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


def read_records(source: str | os.PathLike[str] | Iterable[Any]) -> RecordSet:
    """Read a JSONL, JSON, CSV, TSV or Parquet file, or any iterable of mappings.

    Where a row has several of the known columns, `messages` wins over `prompt` + `completion`, and that
    over `text`; a null counts as an absent column.

    Raises:
        DataError: the file is missing, empty or unreadable, or no record in it can be used.
    """
    if isinstance(source, (str, os.PathLike)):
        name, rows = os.fspath(source), rows_from_file(source)
    else:
        name, rows = f"the given {type(source).__name__}", _rows_from_iterable(source)
    records: list[Record] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            records.append(_record(row))
        except BadRowError as bad:
            problems.append(Problem(row.line, bad.kind, str(bad)))
    if not records:
        raise DataError(nothing_usable(name, problems))
    return RecordSet(records, problems, name)


def references(record: Record) -> list[str]:
    """Return the texts that an answer to this record is compared with, best known first.

    They are the column `references` where the record has one, else its completion or its last answer;
    a record of kind "text" has none.
    """
    given = record.fields.get("references")
    if isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(r, str) for r in given):
        return list(given)
    if record.kind == "messages":
        return [next(m["content"] for m in reversed(record.messages) if m["role"] == "assistant")]
    return [record.completion] if record.kind == "completion" else []


def shown(problems: Sequence[Problem]) -> str:
    """Return the first few problems, one indented line each, and how many more there are."""
    lines = [f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    rest = len(problems) - SHOWN_PROBLEMS
    return "".join(lines) + (f"\n  … and {rest} more" if rest > 0 else "")


def nothing_usable(name: str, problems: Sequence[Problem]) -> str:
    """Return the message for a source that was read and holds nothing to train on."""
    if not problems:
        return f"{name} holds no records. Each record needs {COLUMNS}."
    return f"{name}: none of its {len(problems)} records can be used.{shown(problems)}"


def _rows_from_iterable(source: Iterable[Any]) -> Iterator[Row]:
    if isinstance(source, Mapping):
        hint = f" It has the keys {', '.join(map(str, source))}: pass one split, or a list of records."
        raise DataError(f"A {type(source).__name__} is not a sequence of records.{hint}")
    if isinstance(source, (bytes, bytearray)) or not isinstance(source, Iterable):
        raise DataError(f"Expected a file name or an iterable of mappings, got {type(source).__name__}.")
    return (Row(line, value) for line, value in enumerate(source, start=1))


def _record(row: Row) -> Record:
    """Raises BadRowError: what makes the row unusable."""
    if isinstance(row.value, BadRowError):
        raise row.value
    if not isinstance(row.value, Mapping):
        raise BadRowError("type", f"a record is an object with named columns, this is {_type(row.value)}")
    columns = {str(key): value for key, value in row.value.items() if value is not None}
    if "messages" in columns:
        messages = _messages(columns.pop("messages"), "messages")
        return _dialogue(row.line, messages, 0, columns)
    if "prompt" in columns and "completion" in columns:
        return _pair(row.line, columns.pop("prompt"), columns.pop("completion"), columns)
    if "text" in columns:
        text = _text(columns.pop("text"), "text")
        if not text.strip():
            raise BadRowError("empty-turn", "`text` is empty")
        return Record("text", row.line, text=text, fields=columns)
    raise BadRowError("columns", _columns_missing(columns))


def _columns_missing(columns: Mapping[str, Any]) -> str:
    found = ", ".join(sorted(columns)) or "none"
    missing = [known for known in COLUMN_NAMES if known not in columns]
    guesses = [did_you_mean(column, missing) for column in columns if column not in COLUMN_NAMES]
    guess = next(filter(None, guesses), "")
    for have, lack in (("prompt", "completion"), ("completion", "prompt")):
        if have in columns:
            return f"`{have}` needs `{lack}` beside it; found: {found}.{guess}"
    return f"needs {COLUMNS}; found: {found}.{guess}"


def _pair(line: int, prompt: Any, completion: Any, fields: Mapping[str, Any]) -> Record:
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt, completion = _text(prompt, "prompt"), _text(completion, "completion")
        if not completion.strip():
            raise BadRowError("empty-turn", "`completion` is empty")
        return Record("completion", line, prompt=prompt, completion=completion, fields=fields)
    if isinstance(prompt, str) or isinstance(completion, str):
        types = f"{_type(prompt)} and {_type(completion)}"
        raise BadRowError(
            "type", f"`prompt` and `completion` are both strings or both lists of messages; got {types}"
        )
    given = _messages(prompt, "prompt")
    return _dialogue(line, given + _messages(completion, "completion"), len(given), fields)


def _dialogue(line: int, messages: tuple[Message, ...], context: int, fields: Mapping[str, Any]) -> Record:
    answers = [(i, m) for i, m in enumerate(messages) if i >= context and m["role"] == "assistant"]
    if not answers:
        raise BadRowError(
            "no-assistant-turn", "no message has the role assistant, so there is nothing to learn"
        )
    for i, message in answers:
        if not message["content"].strip():
            raise BadRowError("empty-turn", f"message {i + 1} is an empty assistant turn")
    return Record("messages", line, messages=messages, context=context, fields=fields)


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    if isinstance(value, str):  # a CSV cell holds the list as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRowError("type", f"`{column}` is a string that is not a JSON list of messages") from None
    if not isinstance(value, Iterable) or isinstance(value, (str, Mapping)):
        raise BadRowError("type", f"`{column}` is {_type(value)}, not a list of messages")
    return tuple(_message(item, i, column) for i, item in enumerate(value, start=1))


def _message(item: Any, number: int, column: str) -> Message:
    where = f"message {number} of `{column}`"
    if not isinstance(item, Mapping):
        raise BadRowError("type", f"{where} is {_type(item)}, not an object with `role` and `content`")
    missing = [key for key in ("role", "content") if item.get(key) is None]
    if missing:
        keys = ", ".join(map(str, item)) or "none"
        raise BadRowError("columns", f"{where} has no {' and no '.join(missing)}; its keys: {keys}")
    role = item["role"]
    if role not in ROLES:
        raise BadRowError("role", f"{where} has the role {role!r}; known: {', '.join(ROLES)}")
    return {"role": role, "content": _text(item["content"], f"content of {where}")}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRowError("type", f"`{where}` is {_type(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate: no tokenizer can take it
        raise BadRowError("encoding", f"`{where}` holds bytes that are not UTF-8") from None
    return value


def _type(value: Any) -> str:
    names = {type(None): "null", str: "a string", list: "a list", dict: "an object", bool: "a boolean"}
    return names.get(type(value), f"of type {type(value).__name__}")
