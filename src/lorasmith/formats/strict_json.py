"""JSON of unknown origin: no duplicate keys, no NaN, no surprise from deep nesting or huge numbers."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        ValueError: for anything else, with the reason.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a JSON {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r:.80} is there more than once")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
