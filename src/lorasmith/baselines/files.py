"""What a method leaves on disk: `method.safetensors` and `method.json`, which names the method."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorasmith.baselines.options import OPTIONS
from lorasmith.errors import AdapterFileError, OutputError
from lorasmith.formats import METHOD_FILE, publish_directory, read_json, read_tensors

WEIGHTS_FILE = "method.safetensors"
METHOD_FILES = (METHOD_FILE, WEIGHTS_FILE)
FORMAT_VERSION = 1


@dataclass(eq=False)
class Tuned:
    """What a method trained: its name, its settings and its tensors, on the CPU. Holds no module.

    Attributes:
        options: every option of the method, and what else is needed to apply the tensors.
        provenance: base, data, run and versions, as in an adapter's sidecar.
    """

    method: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def num_params(self) -> int:
        """Numbers that are kept."""
        return sum(t.numel() for t in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def digest(self) -> str:
        """sha256 over method, options and every tensor's name, dtype, shape and bytes."""
        hash_ = hashlib.sha256(json.dumps([self.method, self.options], sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            hash_.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            hash_.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return hash_.hexdigest()


def is_method(path: str | Path) -> bool:
    """Whether the directory `path` holds what a method other than LoRA trained."""
    return (Path(path) / METHOD_FILE).is_file()


def write_method(tuned: Tuned, path: str | Path) -> None:
    """Write the directory `path`, at once or not at all; a method's directory that is there is replaced.

    Raises:
        AdapterFileError: a tensor is not finite, or there is none. OutputError: `path` cannot be written.
    """
    path = Path(path)
    faults = [f"{n} holds numbers that are not finite" for n, t in tuned.tensors.items() if not _finite(t)]
    if faults or not tuned.tensors:
        raise AdapterFileError(
            f"{path} was not written.\n  " + "\n  ".join(faults or ["there are no tensors"])
        )

    def fill(directory: Path) -> None:
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tuned.tensors.items()}
        try:
            save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, mostly
            raise OutputError(f"{path} cannot be written: {error}") from error
        (directory / METHOD_FILE).write_text(method_text(tuned), encoding="utf-8")

    publish_directory(path, fill, replaceable=METHOD_FILES)


def method_text(tuned: Tuned) -> str:
    """Contents of `method.json`."""
    values = {
        "format_version": FORMAT_VERSION,
        "method": tuned.method,
        "options": tuned.options,
        "content_digest": tuned.digest,
        "provenance": tuned.provenance,
    }
    return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_method(path: str | Path) -> Tuned:
    """Read what `write_method` wrote, every tensor of it.

    Raises:
        AdapterFileError: it is not there, damaged, changed since, or names a method unknown here.
    """
    path = Path(path)
    if not is_method(path):
        raise AdapterFileError(f"{path} has no {METHOD_FILE}, so it holds no method's weights.")
    values = read_json(path / METHOD_FILE)
    if values.get("format_version") != FORMAT_VERSION:
        raise AdapterFileError(
            f"{path}: format_version is {values.get('format_version')!r:.20}, but {FORMAT_VERSION} is read here."
        )
    method, options, provenance = (values.get(k) for k in ("method", "options", "provenance"))
    if method not in OPTIONS or not isinstance(options, dict) or not isinstance(provenance, dict):
        raise AdapterFileError(
            f"{path}: {METHOD_FILE} names the method {method!r:.40}; known are {', '.join(OPTIONS)}. "
            "It needs method, options and provenance."
        )
    if method == "full":
        raise AdapterFileError(
            f'{path} holds a fully fine-tuned model (method "full"), which is a base of its own: give it as --base.'
        )
    tuned = Tuned(str(method), options, read_tensors(path / WEIGHTS_FILE), provenance)
    _check_content(path, tuned, values)
    return tuned


def _check_content(path: Path, tuned: Tuned, values: Mapping[str, Any]) -> None:
    faults = [f"{n} holds numbers that are not finite" for n, t in tuned.tensors.items() if not _finite(t)]
    if tuned.digest != values.get("content_digest"):
        faults.append(f"the weights or options changed after they were written (see {METHOD_FILE})")
    if faults:
        raise AdapterFileError(f"{path} cannot be used:\n  " + "\n  ".join(faults))


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
