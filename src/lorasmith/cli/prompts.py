"""Batch files of `lorasmith generate`: one JSON object a line, each a question with its own settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from lorasmith.engine import Request

SETTINGS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
KEYS = ("prompt", "messages", "adapter", "id", *SETTINGS)
SHOWN_FAULTS = 10


@dataclass(frozen=True)
class Question:
    """A request and where it came from. `id` is handed through as it was found."""

    line: int
    request: Request
    id: Any = None


def read_questions(path: Path, defaults: Mapping[str, Any], adapters: Iterable[str]) -> list[Question]:
    """Every line of a JSONL file as a request. A line names its adapter; null is the plain base.

    Args:
        defaults: settings of lines that name none of their own.
        adapters: names that may be used; a line without one gets the only one, if there is only one.

    Raises:
        DataError: with every fault and its line; then nothing is asked.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    names, questions, faults = list(adapters), [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            questions.append(_question(number, line, defaults, names))
        except (ValueError, TypeError) as error:
            faults.append(f"line {number}: {str(error).replace(chr(10), ' ')}")
    if faults:
        more = [f"… and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
        raise DataError(f"{path} cannot be used:\n  " + "\n  ".join(faults[:SHOWN_FAULTS] + more))
    if not questions:
        raise DataError(
            f"{path} holds no questions. Write one JSON object a line, with `prompt` or `messages`."
        )
    return questions


def _question(number: int, line: str, defaults: Mapping[str, Any], names: list[str]) -> Question:
    from lorasmith.engine import Request

    value = json.loads(line)
    if not isinstance(value, dict):
        raise DataError("a JSON object is needed")
    for key in value:
        if key not in KEYS:
            raise DataError(f'"{key}" is unknown.{did_you_mean(key, KEYS)} Keys: {", ".join(KEYS)}.')
    if ("prompt" in value) == ("messages" in value):
        raise DataError("give either `prompt` (a text) or `messages` (a list of role and content)")
    settings = dict(defaults) | {k: value[k] for k in SETTINGS if k in value}
    request = Request(_prompt(value), adapter=_adapter(value, names), **settings)
    return Question(number, request, value.get("id"))


def _prompt(value: Mapping[str, Any]) -> Any:
    if "prompt" in value:
        if not isinstance(value["prompt"], str) or not value["prompt"].strip():
            raise DataError("`prompt` must be a text that is not empty")
        return value["prompt"]
    messages = value["messages"]
    turns = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
    if not turns or not all(isinstance(m.get(k), str) for m in messages for k in ("role", "content")):
        raise DataError("`messages` must be a list of objects with `role` and `content`")
    return messages


def _adapter(value: Mapping[str, Any], names: list[str]) -> str | None:
    if "adapter" not in value:
        if len(names) > 1:
            raise ConfigError(
                f'it names no adapter, and there are {", ".join(names)}. Add "adapter": NAME, or null for the base'
            )
        return names[0] if names else None
    name = value["adapter"]
    if name is not None and name not in names:
        hint = did_you_mean(str(name), names) or f" There are: {', '.join(names) or 'none'}."
        raise ConfigError(f"no adapter {name!r} was given with --adapter.{hint}")
    return name  # type: ignore[no-any-return]
