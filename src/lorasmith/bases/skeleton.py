"""A base without its weights: every module and shape in place, on the meta device, in a tenth of a second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.bases.headers import read_headers
from lorasmith.bases.load import base_directory, quiet
from lorasmith.errors import BaseNotFoundError

ITEMSIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Skeleton:
    """`model` holds no numbers. `file_itemsize`: bytes of a weight in the base's files; `file_bytes`: of all."""

    model: Any
    directory: Path
    file_itemsize: int
    file_bytes: int


def load_skeleton(name: str | Path) -> Skeleton:
    """Build the model that `load_base` would load, from its config and its files' headers alone.

    Raises:
        BaseNotFoundError: as `load_base`, or config and headers disagree about a weight's shape.
    """
    import torch
    import transformers

    directory = base_directory(name)
    headers = read_headers(directory)
    with quiet(), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.eval().requires_grad_(False)
    _check_shapes(directory, model, {name: header.shape for name, header in headers.items()})
    sizes = [header.end - header.begin for header in headers.values()]
    itemsize = max((ITEMSIZES.get(header.dtype, 2) for header in headers.values()), default=2)
    return Skeleton(model, directory, itemsize, sum(sizes))


def _check_shapes(directory: Path, model: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Headers may name tensors that the model renames on loading, so only those of the same name are compared."""
    wrong = [
        f"{name}: config {tuple(parameter.shape)}, file {shapes[name]}"
        for name, parameter in model.named_parameters()
        if name in shapes and tuple(parameter.shape) != shapes[name]
    ]
    if wrong:
        raise BaseNotFoundError(
            f"{directory}: config.json and the weights disagree:\n  " + "\n  ".join(wrong[:8])
        )
