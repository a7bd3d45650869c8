"""Where the data that ships with lorasmith lies."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from lorasmith.errors import DataError, did_you_mean

SAMPLES = tuple(
    f"{task}/{part}" for task in ("e2e", "clinc150", "wikisql") for part in ("train", "validation", "test")
)


def sample_path(name: str) -> Path:
    """Return the JSONL file of a shipped sample, such as `e2e/train`; its licence lies beside it.

    Raises:
        DataError: no sample has this name.
    """
    if name not in SAMPLES:
        raise DataError(
            f"There is no sample {name!r}; shipped: {', '.join(SAMPLES)}.{did_you_mean(name, SAMPLES)}"
        )
    return Path(str(files("lorasmith"))) / "samples" / f"{name}.jsonl"
