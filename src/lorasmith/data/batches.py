"""Examples become optimizer steps: the order is a function of (seed, epoch), so a step number is enough."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lorasmith.data.encode import Example
from lorasmith.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Steps:
    """Item k holds the indices of the examples that optimizer step k trains on, k from 0.

    Within an epoch every example comes once (with `drop_last`, but for the last `examples % batch_size`).
    """

    examples: int
    batch_size: int
    epochs: int
    seed: int
    drop_last: bool
    shuffle: bool = True

    @property
    def per_epoch(self) -> int:
        """Optimizer steps in one pass over the examples."""
        full, rest = divmod(self.examples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __len__(self) -> int:
        return self.per_epoch * self.epochs

    def __getitem__(self, step: int) -> list[int]:
        if not -len(self) <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        epoch, within = divmod(step % len(self), self.per_epoch)
        start = within * self.batch_size
        if not self.shuffle:
            return list(range(start, min(start + self.batch_size, self.examples)))
        order = _order(self.examples, self.seed, epoch)
        return [int(i) for i in order[start : start + self.batch_size]]

    def __iter__(self) -> Iterator[list[int]]:
        return (self[step] for step in range(len(self)))


def steps(
    examples: Sized,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    drop_last: bool = False,
    shuffle: bool = True,
) -> Steps:
    """Plan the optimizer steps of a run; nothing but the number of examples is looked at.

    Raises:
        ConfigError: `batch_size` or `epochs` is below 1, or `seed` is negative.
        DataError: there are no examples, or `drop_last` leaves no step.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("epochs", epochs, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name}={value}: it must be at least {least}.")
    plan = Steps(len(examples), batch_size, epochs, seed, drop_last, shuffle)
    if not len(plan):
        advice = f" Lower batch_size={batch_size} or keep the last batch." if len(examples) else ""
        raise DataError(f"{len(examples)} examples make no optimizer step.{advice}")
    return plan


def fingerprint(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of every token and every mask bit, in order: what a run was really trained on."""
    digest = hashlib.sha256(b"lorasmith examples 1\n")
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.tokens.astype("<i4").tobytes())
        digest.update(example.supervised.astype("u1").tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> npt.NDArray[np.intp]:
    # numpy promises that a bit generator's raw stream never changes, and does not promise that of
    # Generator.permutation; a resumed run may meet a newer numpy.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(keys, kind="stable")
