"""What an adapter must fit, read off a base's files."""

from __future__ import annotations

from pathlib import Path

from lorasmith.bases import fingerprint_directory, match_base, read_headers
from lorasmith.quantised import require_kind
from lorasmith.store.records import BaseFacts


def base_facts(
    directory: Path, name: str, *, quantize: str | None = None, allow_mismatch: bool = False
) -> BaseFacts:
    """Of the base in `directory`, which messages call `name`; no weight is loaded.

    Args:
        quantize: the format that its linear layers are put into on loading.
        allow_mismatch: adapters of other bases are taken if their shapes fit.

    Raises:
        ConfigError: there is no such format.
        BaseNotFoundError: a file is missing or damaged.
    """
    if quantize is not None:
        require_kind(quantize)
    shapes = {name: tensor.shape for name, tensor in read_headers(directory).items()}
    if allow_mismatch:
        return BaseFacts(name, shapes, lambda _: None)
    fingerprint = fingerprint_directory(directory, quantised=quantize)
    return BaseFacts(name, shapes, lambda provenance: match_base(provenance, fingerprint))
