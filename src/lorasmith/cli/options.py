"""Options that several commands share, and the two ways of printing a result."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from lorasmith.bases import Base
    from lorasmith.formats import Problem
    from lorasmith.lora import Adapter

BaseOption = Annotated[str, typer.Option("--base", help="Local directory, built-in name or hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, bf16, fp16 or fp32.")]
QuantizeOption = Annotated[
    str | None, typer.Option("--quantize", help="Hold the base's linear layers as nf4 or int8.")
]
MismatchOption = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Use an adapter that was trained on another base.")
]

MAX_SHOWN = 8


def print_json(result: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(result, default=str))


def say(text: str = "") -> None:
    """A line for people, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def probe_ids(base: Base) -> Tensor:
    """Sixteen tokens, (1, 16), to compare logits on."""
    import torch

    return (torch.arange(16)[None] * 7 + 3) % int(base.model.get_input_embeddings().weight.shape[0])


def load_adapter(path: Path, base: Base, *, allow_base_mismatch: bool = False) -> Adapter:
    """Read an adapter and check that it was trained on `base`, where it says on what.

    What `lorasmith check` would report and does not make it unusable is said on stderr.
    """
    from lorasmith.bases import require_base
    from lorasmith.formats import check_values, read_adapter

    adapter = read_adapter(path)
    if "base" not in adapter.provenance:
        say(f"{path} carries no lorasmith sidecar: that it was trained on {base.name} cannot be verified")
    elif not allow_base_mismatch:
        require_base(adapter.provenance, base)
    problems = [*_coverage_problems(path, base), *check_values(adapter)]
    for problem in problems[:MAX_SHOWN]:
        say(f"warning: {path}: {problem.kind}: {problem.message}")
    if len(problems) > MAX_SHOWN:
        say(f"warning: {path}: {len(problems) - MAX_SHOWN} more; `lorasmith check` lists them all")
    return adapter


def parse_bytes(text: str) -> int:
    """`8GiB`, `500 MB`, `2e9` in bytes.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?)(iB|B)?\s*", text, re.IGNORECASE)
    try:
        value = float(match[1]) if match else 0.0
    except ValueError:
        value = 0.0
    if match is None or value <= 0:
        raise ConfigError(f'"{text}" was given as a size; write one such as 8GiB, 500MB or 2000000000.')
    step = 1000 if (match[3] or "iB").upper() == "B" else 1024
    power = " KMGT".index(match[2].upper() or " ")
    return round(value * float(step) ** power)


def _coverage_problems(path: Path, base: Base) -> Sequence[Problem]:
    from lorasmith.bases import read_headers
    from lorasmith.formats import check_coverage, read_header

    if base.directory is None:
        return ()
    shapes = {name: tensor.shape for name, tensor in read_headers(base.directory).items()}
    return check_coverage(read_header(path), shapes).problems
