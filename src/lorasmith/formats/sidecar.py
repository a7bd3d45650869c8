"""`lorasmith.json`, beside the weights: what they must hash to, and where they come from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.errors import AdapterFileError
from lorasmith.formats.strict_json import parse_object

FILE_NAME = "lorasmith.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Sidecar:
    """`content_digest` is `Adapter.digest`; none for adapters of other tools."""

    content_digest: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def sidecar_text(content_digest: str, provenance: dict[str, Any]) -> str:
    """Return the file's text.

    Raises:
        AdapterFileError: the provenance is not plain JSON.
    """
    values = {
        "format_version": FORMAT_VERSION,
        "content_digest": content_digest,
        "provenance": provenance,
    }
    try:
        return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise AdapterFileError(
            f"adapter.provenance cannot be written as JSON ({error}); use plain values"
        ) from None


def parse_sidecar(path: Path, data: bytes, faults: list[str]) -> Sidecar:
    """Validate the file's content; what is wrong goes to `faults`."""
    try:
        values = parse_object(data)
    except ValueError as error:
        faults.append(f"{path.name}: {error}")
        return Sidecar()
    version, digest, provenance = (values.get(k) for k in ("format_version", "content_digest", "provenance"))
    if type(version) is not int or version != FORMAT_VERSION:
        faults.append(f"{path.name}: format_version is {version!r:.20}, but {FORMAT_VERSION} is read here")
    elif not isinstance(digest, str) or not isinstance(provenance, dict):
        faults.append(f"{path.name}: content_digest or provenance is missing")
    else:
        return Sidecar(digest, provenance)
    return Sidecar()
