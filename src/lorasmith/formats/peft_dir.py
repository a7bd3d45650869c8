"""PEFT's adapter directory, written and read: exact names, reproducible bytes, strict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lorasmith.errors import AdapterFileError, OutputError
from lorasmith.formats import sidecar
from lorasmith.formats.header import CONFIG_NAME, FILE_NAMES, WEIGHTS_NAME, read_header
from lorasmith.formats.peft_config_out import config_values, unwritable
from lorasmith.formats.peft_load import load_adapter
from lorasmith.formats.peft_names import tensor_name
from lorasmith.formats.peft_shifted import read_shifted
from lorasmith.formats.peft_tensors import experts_to_file, in_wrapping_order, stacks_of, to_file
from lorasmith.formats.publish import publish_directory
from lorasmith.lora import Adapter, Factors


def read_adapter(path: str | Path, *, initial: str | Path | None = None) -> Adapter:
    """Read the adapter in the directory `path`, every tensor of it, on the CPU.

    Args:
        initial: the same adapter as it was saved before its first step. Needed where the method took
            a part out of the base (PiSSA, OLoRA, CorDA, LoRA-GA); the result has twice the rank.

    Raises:
        AdapterFileError: with every fault at once; then nothing is returned.
    """
    if initial is not None:
        return read_shifted(path, initial)
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
    adapter, header = load_adapter(path)
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
        dtype: of the tensors in the file; as they are by default. PEFT's copies of base weights
            keep their own.
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


def _for_disk(adapter: Adapter, dtype: torch.dtype | None) -> Adapter:
    """Copy on the CPU: contiguous, no memory shared between tensors."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", dtype, copy=True).contiguous()

    factors = {p: replace(f, A=copy(f.A), B=copy(f.B)) for p, f in adapter.factors.items()}
    biases = {p: copy(b) for p, b in adapter.biases.items()}
    extras, exact = adapter.extras.to(dtype), adapter.extras.to().weights
    # copies of the base's own weights are not the adapter's to round
    extras.weights |= {n: exact[n] for n in exact if n.rpartition(".")[0] in adapter.factors}
    return replace(adapter, factors=factors, biases=biases, extras=extras)


def _named(adapter: Adapter) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    factors = adapter.factors
    for path, f in factors.items():
        if f.layout.kind != "expert":
            is_embedding = f.layout.kind == "embedding"
            for part, tensor in zip(("A", "B"), to_file(f), strict=True):
                named[tensor_name(path, part, is_embedding=is_embedding)] = tensor.contiguous()  # type: ignore[arg-type]
    named |= _named_stacks(adapter)
    for path, bias in adapter.biases.items():
        named[tensor_name(path, "bias", has_factors=path in factors)] = bias
    return named | _named_extras(adapter)


def _named_stacks(adapter: Adapter) -> dict[str, Tensor]:
    stacks = stacks_of(adapter.factors)
    named: dict[str, Tensor] = {}
    for owner in {stack.rpartition(".")[0] for stack in stacks}:
        inner_first = in_wrapping_order(s.rpartition(".")[2] for s in stacks if s.rpartition(".")[0] == owner)
        for depth, parameter in enumerate(reversed(inner_first)):
            pair = experts_to_file(stacks[f"{owner}.{parameter}"])
            for part, tensor in zip(("A", "B"), pair, strict=True):
                named[tensor_name(owner + ".base_layer" * depth, part)] = tensor.contiguous()  # type: ignore[arg-type]
    return named


def _named_extras(adapter: Adapter) -> dict[str, Tensor]:
    extras, factors = adapter.extras, adapter.factors
    named = {
        tensor_name(name, "weight", has_factors=name.rpartition(".")[0] in factors): tensor
        for name, tensor in extras.weights.items()
    }
    named |= {tensor_name(path, "rows"): rows.values for path, rows in extras.rows.items()}
    named |= {tensor_name(path, "shift"): shift for path, shift in extras.shifts.items()}
    for path, m in extras.magnitudes.items():
        axes = (1,) * len(factors[path].layout.kernel)  # a convolution's magnitude has its output's axes
        named[tensor_name(path, "magnitude")] = m.view(1, -1, *axes) if axes else m
    return named


def _check_writable(adapter: Adapter, path: Path) -> None:
    faults = [] if adapter.factors or adapter.extras else ["the adapter has no factors"]
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
    faults += unwritable(adapter)
    if faults:
        raise AdapterFileError(f"{path} was not written.\n" + "\n".join(f"  {fault}" for fault in faults))


def _as_read_back(adapter: Adapter, directory: Path, path: Path) -> Adapter:
    """Return the adapter that a reader of `directory` will see: strict reading is the last check."""
    try:
        modules = read_header(directory).modules
    except AdapterFileError as error:
        faults = str(error).partition("\n")[2] or str(error)
        raise AdapterFileError(f"{path} was not written, nobody could read it.\n{faults}") from None
    factors: dict[str, Factors] = {}
    for place, f in adapter.factors.items():
        stack = place.rpartition(".")[0] if f.layout.kind == "expert" else place
        factors[place] = replace(f, scaling=modules[stack].scaling)
        if f.layout.kind == "expert" and f.rank < modules[stack].rank:
            missing = modules[stack].rank - f.rank
            factors[place].A, factors[place].B = F.pad(f.A, (0, 0, 0, missing)), F.pad(f.B, (0, missing))
    return replace(adapter, factors=factors)
