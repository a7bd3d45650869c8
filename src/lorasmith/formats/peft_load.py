"""Every tensor of a PEFT directory as an `Adapter`; what its header says is already checked."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.errors import AdapterFileError
from lorasmith.formats.container import read_tensor
from lorasmith.formats.header import WEIGHTS_NAME, AdapterHeader, read_header, refuse
from lorasmith.formats.peft_tensors import experts_from_file, from_file
from lorasmith.lora import Adapter, Extras, Factors, TokenRows


def load_adapter(path: str | Path, *, is_shifted: bool = False) -> tuple[Adapter, AdapterHeader]:
    """Read every tensor in the directory `path`; see `read_header` for `is_shifted`."""
    header = read_header(path, is_shifted=is_shifted)
    tensors = _load(header)
    refuse(
        header.path,
        [f"{path}: {part} holds numbers that are not finite" for path, part in _non_finite(tensors)],
    )
    factors: dict[str, Factors] = {}
    for p, m in header.modules.items():
        A, B = tensors[p, "A"], tensors[p, "B"]
        if m.layout.kind == "expert":
            pairs = experts_from_file(A, B, rank=m.rank, scaling=m.scaling)
            factors |= {f"{p}.{e}": pair for e, pair in enumerate(pairs)}
        else:
            factors[p] = from_file(A, B, m.scaling, m.layout)
    biases = {p: tensors[p, "bias"] for p in header.biases}
    adapter = Adapter(header.config, factors, biases, dict(header.provenance), _extras(header, tensors))
    return adapter, header


def _extras(header: AdapterHeader, tensors: dict[tuple[str, str], Tensor]) -> Extras:
    def of(wanted: str) -> dict[str, Tensor]:
        return {path: tensor for (path, part), tensor in tensors.items() if part == wanted}

    return Extras(
        weights=of("weight"),
        rows={p: TokenRows(header.config.trainable_tokens[p], values) for p, values in of("rows").items()},
        shifts=of("shift"),
        magnitudes={path: m.flatten() for path, m in of("magnitude").items()},
    )


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
