"""How much each experiment spends, quick and full, and the records that it spends it on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorasmith.claims.claim import Setting
from lorasmith.data import read_records, sample_path

BATCH = 8


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiments.

    Attributes:
        steps: optimizer steps of a run, of 8 records each; a run on fewer records repeats them.
        held_out: records that every loss is measured on.
        rates: learning rates that a method tries with the first seed.
        seeds: of the factors and the data order; those after the first train at the chosen rate alone.
        full_seeds: the same for full fine-tuning, which costs most.
        ranks, qv_ranks: of LoRA on all linear layers, and on q and v.
        few: numbers of records of the low-data runs, besides `pairs`.
        lengths: virtual tokens of the prefixes.
        dimensions, projections: tried for d90 in LoRA's space, and how many random ones of each.
        byte_steps: optimizer steps of the byte model.
    """

    steps: int
    held_out: int
    seeds: tuple[int, ...]
    full_seeds: tuple[int, ...]
    rates: tuple[float, ...]
    full_rates: tuple[float, ...]
    prefix_rates: tuple[float, ...]
    ranks: tuple[int, ...]
    qv_ranks: tuple[int, ...]
    few: tuple[int, ...]
    lengths: tuple[int, ...]
    dimensions: tuple[int, ...]
    projections: int
    byte_steps: int

    @property
    def pairs(self) -> int:
        """Training records of a run that sees none twice."""
        return BATCH * self.steps


FULL = Sizes(
    steps=16,
    held_out=48,
    seeds=(0, 1),
    full_seeds=(0, 1),
    rates=(1.5e-3, 4e-3),
    full_rates=(1e-4, 2e-4),
    prefix_rates=(1e-3, 4e-3),
    ranks=(1, 4, 16, 64),
    qv_ranks=(1, 8, 64),
    few=(16, 48),
    lengths=(1, 16, 64, 256),
    dimensions=(256, 1024, 4096, 16384),
    projections=2,
    byte_steps=300,
)
LONG = replace(FULL, steps=64, rates=(1e-3, 3e-3))
"""For what a short training can't show: what its rank does for an adapter, and what it has learned."""
QUICK = Sizes(
    steps=3,
    held_out=16,
    seeds=(0, 1),
    full_seeds=(0,),
    rates=(4e-3,),
    full_rates=(2e-4,),
    prefix_rates=(4e-3,),
    ranks=(1, 64),
    qv_ranks=(8, 64),
    few=(8,),
    lengths=(1, 16),
    dimensions=(256, 16384),
    projections=1,
    byte_steps=60,
)


def sizes(setting: Setting) -> Sizes:
    """Those of the setting."""
    return QUICK if setting.quick else FULL


def long_sizes(setting: Setting) -> Sizes:
    """Those of the claims about the rank and the update itself."""
    return QUICK if setting.quick else LONG


def training_records(pairs: int) -> list[dict[str, str]]:
    """`pairs` records of the E2E sample, evenly spaced, so that they speak of as many restaurants as they can."""
    return _spread("e2e/train", pairs)


def held_out_records(count: int) -> list[dict[str, str]]:
    """`count` of the sample's validation records; no prompt of theirs is trained on."""
    return _spread("e2e/validation", count)


def _spread(name: str, count: int) -> list[dict[str, str]]:
    records = read_records(sample_path(name)).records
    chosen = [records[i * len(records) // count] for i in range(min(count, len(records)))]
    return [{"prompt": r.prompt, "completion": r.completion} for r in chosen]
