"""Everything that a bit-identical resume needs, written atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.errors import OutputError, TrainingError
from lorasmith.train.checkpoint_shards import in_shards, load_shards, require_all, save_shards
from lorasmith.train.shard import UNSHARDED, Shards, local
from lorasmith.train.world import ALONE, World

KEPT = 2
MOMENTS = ("exp_avg", "exp_avg_sq")
ROUNDING = ("processes", "in_parts", "threads")
"""Of a run's identity, what changes the order in which numbers are added up and nothing else."""


@dataclass
class Progress:
    """Where a run stands after `step` optimizer steps.

    Attributes:
        identity: what must be the same for the run to go on: settings, data and base fingerprints.
        files: of the checkpoint that holds this, besides `state.json`; all must be there.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    train_s: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)


def save_checkpoint(
    folder: Path,
    progress: Progress,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    shards: Shards = UNSHARDED,
    world: World = ALONE,
) -> Path:
    """Write `folder/step-…` whole or not at all; keep the last two, and the best as of each.

    Every process calls it. The first one writes, and where parameters are parts each process its own.
    """
    target = folder / f"step-{progress.step:08d}"
    temporary = folder / f".step-{progress.step:08d}.{world.of_first(os.getpid()) if shards else os.getpid()}"
    aside = temporary.with_name(temporary.name + ".old")
    try:
        if world.is_first:
            for leftover in (temporary, aside):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir(parents=True, exist_ok=True)  # another process may have been quicker
        if shards:
            save_shards(temporary, shards.named(_tensors(parameters, optimizer)))
        if not world.is_first:
            return target
        if shards:
            require_all(temporary)
        else:
            save_file(_tensors(parameters, optimizer), temporary / "state.safetensors")
        written = replace(progress, files=sorted(file.name for file in temporary.iterdir()))
        (temporary / "state.json").write_text(json.dumps(asdict(written), indent=2))
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        if target.exists():  # put aside, for a kill within rmtree would leave half of it in its place
            os.replace(target, aside)
        os.replace(temporary, target)
        _sync(folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            f"The checkpoint {target} could not be written: {error}. The last one is intact."
        ) from error
    _prune(folder)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return found[-1] if found else None


def load_checkpoint(
    path: Path,
    identity: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    shards: Shards = UNSHARDED,
) -> Progress:
    """Put parameters, optimizer and random state back; returns where the run stood.

    Raises:
        TrainingError: the checkpoint is damaged, or belongs to a run with other settings, data or base.
    """
    with _readable(path):
        progress = Progress(**json.loads((path / "state.json").read_text()))
        _check_identity(path, progress.identity, identity)
        tensors = _read(path, parameters, shards)
    _restore(tensors, parameters, optimizer)
    return progress


def adds_otherwise(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run goes on with other processes or parts: then to rounding, no longer to the bit."""
    return any(before.get(key) != now.get(key) for key in ROUNDING[:2])


def checkpoint_parameters(
    path: Path, parameters: Mapping[str, Tensor], shards: Shards = UNSHARDED
) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint, by parameter name; of those that lie in parts this process's."""
    with _readable(path):
        tensors = _read(path, parameters, shards, ("param",))
    return {name.removeprefix("param/"): t for name, t in tensors.items() if name.startswith("param/")}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise TrainingError(
            f"The checkpoint {path} cannot be read ({error}). Delete it to go on from the one before."
        ) from error


def _read(
    path: Path,
    parameters: Mapping[str, Tensor],
    shards: Shards,
    keys: Sequence[str] = ("param", *MOMENTS),
) -> dict[str, Tensor]:
    for file in json.loads((path / "state.json").read_text()).get("files", []):
        if not (path / file).is_file():
            raise FileNotFoundError(f"{file} is not there")
    if shards or in_shards(path):
        room = {f"{key}/{name}": torch.empty_like(p) for name, p in parameters.items() for key in keys}
        room |= {f"step/{name}": torch.zeros(()) for name in parameters} | _random_states()
        tensors = {name: local(tensor) for name, tensor in load_shards(path, shards.named(room)).items()}
    else:
        tensors = load_file(path / "state.safetensors")
    missing = [name for name in parameters if f"param/{name}" not in tensors]
    if missing:
        raise ValueError(f"it lacks {len(missing)} parameters, {missing[0]} among them")
    return tensors


def _random_states() -> dict[str, Tensor]:
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states


def _tensors(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"param/{name}": p.detach().contiguous() for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}/{name}"] = value.detach().contiguous()
    return tensors | _random_states()


@torch.no_grad()
def _restore(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    for name, p in parameters.items():
        p.copy_(tensors[f"param/{name}"])
        state = {key: tensors[f"{key}/{name}"] for key in ("step", *MOMENTS) if f"{key}/{name}" in tensors}
        if state:
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])


def _check_identity(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    rounding = ROUNDING if adds_otherwise(before, now) else ()
    lines = [
        f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and key not in rounding
    ]
    if lines:
        raise TrainingError(
            f"{path} belongs to another run; going on would mix the two:\n  "
            + "\n  ".join(lines)
            + "\n  Resume with the same settings, or choose another output folder."
        )


def _prune(folder: Path) -> None:
    found = sorted(folder.glob("step-*"))
    wanted = {path.name for path in found[-KEPT:]} | {_best_of(path) for path in found[-KEPT:]}
    for path in found:
        if path.name not in wanted:
            shutil.rmtree(path, ignore_errors=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _best_of(path: Path) -> str | None:
    """Name of the checkpoint that held the lowest evaluation loss when `path` was written."""
    try:
        step = json.loads((path / "state.json").read_text())["best_step"]
    except (OSError, ValueError, KeyError):
        return None
    return None if step is None else f"step-{step:08d}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
