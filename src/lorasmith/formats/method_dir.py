"""Directories of other methods than LoRA: recognised here, so that a reader of adapters says what it was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasmith.errors import AdapterFileError
from lorasmith.formats.strict_json import parse_object

METHOD_FILE = "method.json"
_MAX_JSON_BYTES = 4_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`, strictly.

    Raises:
        AdapterFileError: it cannot be read, is larger than such a file can be, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
        if len(data) > _MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {_MAX_JSON_BYTES:,} bytes")
        return parse_object(data)
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}.") from None


def what_else(path: Path) -> str | None:
    """What the directory `path` holds instead of a LoRA adapter, in a sentence; None if nobody says so."""
    if not (path / METHOD_FILE).is_file():
        return None
    method = read_json(path / METHOD_FILE).get("method")
    if method == "full":
        return 'it holds a fully fine-tuned model (method "full"): a base of its own, for --base'
    return (
        f"it holds what method {str(method)[:40]!r} trained, which is no LoRA adapter: `lorasmith eval`, `generate`, "
        "`inspect` and `check` read it; it has no factors to merge, combine, export or serve"
    )
