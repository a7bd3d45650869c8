"""Where a model's pristine weights can be read again: its own safetensors files.

`bases` notes it on the model, `inject` reads it, so that an exact unmerge costs no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

_ATTRIBUTE = "lorasmith_file_source"


@dataclass(frozen=True)
class FileSource:
    """`tensors`: parameter name → (safetensors file, key in that file)."""

    tensors: Mapping[str, tuple[Path, str]]


def set_file_source(model: nn.Module, source: FileSource) -> None:
    """Note on `model` that its weights came from `source`."""
    model.__dict__[_ATTRIBUTE] = source


def file_source_of(model: nn.Module) -> FileSource | None:
    """What `set_file_source` noted, if anything."""
    source = model.__dict__.get(_ATTRIBUTE)
    return source if isinstance(source, FileSource) else None
