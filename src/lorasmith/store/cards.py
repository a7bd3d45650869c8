"""What an adapter is, for people who choose one: read from its header and sidecar, no weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasmith.formats import AdapterHeader, read_header

MAX_TEXT = 200
# What the sidecar of a training run tells, by where it stands there. Paths of files are left out.
RUN = {
    "method": ("run", "train", "method"), "learning_rate": ("run", "train", "lr"),
    "epochs": ("run", "train", "epochs"), "max_steps": ("run", "train", "max_steps"),
    "batch_size": ("run", "train", "batch_size"), "batch_tokens": ("run", "train", "batch_tokens"),
    "seed": ("run", "train", "seed"), "init": ("run", "lora", "init"), "dropout": ("run", "lora", "dropout"),
    "data": ("data_fingerprint",), "made_by": ("made_by", "command"), "lorasmith": ("versions", "lorasmith"),
    "torch": ("versions", "torch"),
}  # fmt: skip


def read_card(path: Path) -> dict[str, Any]:
    """Rank, scaling, targets, size and training run of the adapter in `path`, ready for JSON.

    Raises:
        AdapterFileError: it is damaged.
    """
    header = read_header(path)
    modules = header.modules.values()
    leaves = Counter(name.rpartition(".")[2] for name in header.modules)
    return {
        "ranks": sorted({m.rank for m in modules}),
        "scalings": sorted({m.scaling for m in modules}),
        "alpha": header.config.alpha,
        "targets": [{"name": name, "modules": count} for name, count in sorted(leaves.items())],
        "dtypes": sorted({str(slot.dtype).removeprefix("torch.") for slot in header.slots.values()}),
        "params": sum(math.prod(slot.shape) for slot in header.slots.values()),
        "bytes": sum(slot.end - slot.begin for slot in header.slots.values()),
        "beyond_linear": header.beyond_linear,
        "base_name": _base_name(header),
        "run": {key: value for key, place in RUN.items() if (value := _at(header.provenance, place)) is not None},
    }  # fmt: skip


def _base_name(header: AdapterHeader) -> Any:
    return _at(header.provenance, ("base", "name")) or _at({"name": header.base_name}, ("name",))


def _at(values: Any, place: tuple[str, ...]) -> str | int | float | None:
    """A plain value deep inside; None for whatever else a stranger's file holds there."""
    for key in place:
        values = values.get(key) if isinstance(values, Mapping) else None
    if isinstance(values, str):
        return values[:MAX_TEXT]
    return values if isinstance(values, int | float) and math.isfinite(values) else None
