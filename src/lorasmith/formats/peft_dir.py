"""PEFT's adapter directory, written and read: exact names, reproducible bytes, strict."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorasmith.errors import AdapterFileError, OutputError
from lorasmith.formats import sidecar
from lorasmith.formats.container import read_tensor
from lorasmith.formats.header import CONFIG_NAME, FILE_NAMES, WEIGHTS_NAME, AdapterHeader, read_header, refuse
from lorasmith.formats.peft_config_out import config_values
from lorasmith.formats.peft_names import tensor_name
from lorasmith.formats.publish import publish_directory
from lorasmith.lora import Adapter, Factors


def read_adapter(path: str | Path) -> Adapter:
    """Read the adapter in the directory `path`, every tensor of it, on the CPU.

    Raises:
        AdapterFileError: with every fault at once; then nothing is returned.
    """
    return _read(path)[0]


def read_with_digest(path: str | Path) -> tuple[Adapter, str]:
    """`read_adapter`, and the digest of what it read, which is hashed only once.

    Raises:
        AdapterFileError: as `read_adapter` does.
    """
    adapter, digest = _read(path)
    return adapter, adapter.digest if digest is None else digest


def _read(path: str | Path) -> tuple[Adapter, str | None]:
    """The adapter, and its digest where the sidecar made it necessary to form it."""
    header = read_header(path)
    tensors = _load(header)
    refuse(
        header.path,
        [f"{path}: {part} holds numbers that are not finite" for path, part in _non_finite(tensors)],
    )
    factors = {p: Factors(tensors[p, "A"], tensors[p, "B"], m.scaling) for p, m in header.modules.items()}
    biases = {p: tensors[p, "bias"] for p in header.biases}
    adapter = Adapter(header.config, factors, biases, dict(header.provenance))
    if header.content_digest is None:
        return adapter, None
    digest = adapter.digest
    if header.content_digest != digest:
        raise AdapterFileError(
            f"{header.path}: the weights or their scaling changed after they were written.\n"
            f"  digest in {sidecar.FILE_NAME}: {header.content_digest}\n"
            f"  digest of the weights: {digest}\n"
            f"  Copy the adapter again, or delete {sidecar.FILE_NAME} if the change was meant."
        )
    return adapter, digest


def write_adapter(
    adapter: Adapter, path: str | Path, *, dtype: torch.dtype | None = None, base_name: str | None = None
) -> None:
    """Write `adapter` as the directory `path`, at once or not at all; one that is there is replaced.

    PEFT knows a scaling only as alpha / rank (or alpha / √rank). Where no alpha gives exactly the
    scaling at hand, the nearest one is written, which differs by one unit in the last place.

    Args:
        dtype: of the tensors in the file; as they are by default.
        base_name: the base to name in the file; by default the one that `provenance` names.

    Raises:
        AdapterFileError: the adapter is empty, malformed or not finite, so nobody could read it.
        OutputError: `path` cannot be written, or is a directory that holds something else.
    """
    path = Path(path)
    provenance = dict(adapter.provenance)
    if base_name is not None:
        provenance["base_name"] = base_name
    name = provenance.get("base_name")
    on_disk = _for_disk(adapter, dtype)
    _check_writable(on_disk, path)
    settings = config_values(on_disk, name if isinstance(name, str) else None)

    def fill(directory: Path) -> None:
        try:
            save_file(_named(on_disk), directory / WEIGHTS_NAME, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, mostly
            raise OutputError(f"{path} cannot be written: {error}") from error
        # as PEFT does: indent 2, sorted keys, no newline at the end
        (directory / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
        digest = _as_read_back(on_disk, directory, path).digest
        text = sidecar.sidecar_text(digest, provenance)
        (directory / sidecar.FILE_NAME).write_text(text, encoding="utf-8")

    publish_directory(path, fill, replaceable=FILE_NAMES)


def _load(header: AdapterHeader) -> dict[tuple[str, str], Tensor]:
    try:
        with (header.path / WEIGHTS_NAME).open("rb") as file:
            return {key: read_tensor(file, slot) for key, slot in header.slots.items()}
    except OSError as error:
        raise AdapterFileError(f"{header.path} cannot be read: {error}") from error


def _non_finite(tensors: dict[tuple[str, str], Tensor]) -> list[tuple[str, str]]:
    # A sum is finite only if every number is (or it overflowed, so the numbers are looked at).
    return [
        key
        for key, tensor in tensors.items()
        if not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all()
    ]


def _for_disk(adapter: Adapter, dtype: torch.dtype | None) -> Adapter:
    """Copy on the CPU: contiguous, no memory shared between tensors."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", dtype, copy=True).contiguous()

    factors = {p: replace(f, A=copy(f.A), B=copy(f.B)) for p, f in adapter.factors.items()}
    return replace(adapter, factors=factors, biases={p: copy(b) for p, b in adapter.biases.items()})


def _named(adapter: Adapter) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for path, f in adapter.factors.items():
        named[tensor_name(path, "A", has_factors=True)] = f.A
        named[tensor_name(path, "B", has_factors=True)] = f.B
    for path, bias in adapter.biases.items():
        named[tensor_name(path, "bias", has_factors=path in adapter.factors)] = bias
    return named


def _check_writable(adapter: Adapter, path: Path) -> None:
    faults = [] if adapter.factors else ["the adapter has no factors"]
    faults += [
        f"{name} holds numbers that are not finite"
        for name, t in adapter.tensors().items()
        if not torch.isfinite(t).all()
    ]
    for module, f in adapter.factors.items():
        if f.A.ndim != 2 or f.B.ndim != 2:
            faults.append(f"{module}: A {tuple(f.A.shape)} and B {tuple(f.B.shape)} must have two axes")
        if not 0 < f.scaling < 1e24:
            faults.append(f"{module}: scaling {f.scaling} must be positive; fold its sign into B")
    if faults:
        raise AdapterFileError(f"{path} was not written.\n" + "\n".join(f"  {fault}" for fault in faults))


def _as_read_back(adapter: Adapter, directory: Path, path: Path) -> Adapter:
    """Return the adapter that a reader of `directory` will see: strict reading is the last check."""
    try:
        modules = read_header(directory).modules
    except AdapterFileError as error:
        faults = str(error).partition("\n")[2] or str(error)
        raise AdapterFileError(f"{path} was not written, nobody could read it.\n{faults}") from None
    factors = {p: replace(f, scaling=modules[p].scaling) for p, f in adapter.factors.items()}
    return replace(adapter, factors=factors)
