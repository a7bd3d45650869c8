"""A run as `plan` sees it: the base's skeleton, the data's lengths, and the passes they make."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasmith.planning import Decoder, Estimate, Fit, Job, Machine, Pass, Trained, gib

if TYPE_CHECKING:
    import torch

    from lorasmith.data import Stats
    from lorasmith.lora import LoRAConfig
    from lorasmith.train import Layout, TrainConfig

Method = Literal["lora", "full"]
MEASURED_STEPS = 3


@dataclass(frozen=True)
class Planned:
    """`ranks`: path of each target → rank. `runtime_bytes`: what this very process holds without weights."""

    name: str
    decoder: Decoder
    ranks: dict[str, int]
    config: LoRAConfig
    settings: TrainConfig
    layout: Layout
    passes: list[list[Pass]]
    steps: int
    stats: Stats
    file_itemsize: int
    runtime_bytes: int
    dtype: torch.dtype

    @classmethod
    def read(cls, base: str, data: Path, config: LoRAConfig, settings: TrainConfig, *, dtype: str) -> Planned:
        """Build the skeleton, encode the data and lay out its steps."""
        from lorasmith.bases import load_skeleton, load_tokenizer, pick_dtype
        from lorasmith.data import encode, read_records, steps
        from lorasmith.inject import resolve_targets
        from lorasmith.planning import decoder_of, resident_bytes
        from lorasmith.train import choose_layout, passes_of

        chosen, skeleton = pick_dtype(dtype), load_skeleton(base)
        encoded = encode(read_records(data), load_tokenizer(base), max_length=settings.max_length)
        order = steps(
            encoded.examples, batch_size=settings.batch_size, epochs=settings.epochs, seed=settings.seed
        )
        total = min(len(order), settings.max_steps or len(order))
        window = getattr(skeleton.model.config, "sliding_window", None)
        layout = choose_layout(
            settings.packing, encoded.examples, [order[k] for k in range(min(total, order.per_epoch))],
            can_mask=window is None or window >= encoded.stats.longest, dropout=config.dropout,
        )  # fmt: skip
        return cls(
            name=base,
            decoder=decoder_of(skeleton.model, itemsize=chosen.itemsize),
            ranks={path: config.rank_of(path) for path in resolve_targets(skeleton.model, config).chosen},
            config=config,
            settings=settings,
            layout=layout,
            passes=passes_of(
                layout, encoded.examples, order, total=total, batch_tokens=settings.batch_tokens
            ),
            steps=total,
            stats=encoded.stats,
            file_itemsize=skeleton.file_itemsize,
            runtime_bytes=resident_bytes(),
            dtype=chosen,
        )

    def job(self, method: Method) -> Job:
        """The run as planning takes it."""
        trained = Trained(self.ranks if method == "lora" else None)
        return Job(
            self.decoder, trained, self.passes, self.steps,
            recompute=self.settings.checkpoint_layers, file_itemsize=self.file_itemsize,
            is_mapped=self.file_itemsize == self.decoder.itemsize,
        )  # fmt: skip

    def estimate(self, machine: Machine, method: Method, factor: float) -> Estimate:
        """Memory, operations and time of one method."""
        from lorasmith.planning import estimate

        return estimate(self.job(method), machine, runtime_bytes=self.runtime_bytes, time_factor=factor)

    def fit(self, machine: Machine, limit: int | None, factor: float) -> Fit:
        """Settings that fit `limit` and the machine, whichever is smaller."""
        from lorasmith.planning import fit

        within = machine if limit is None else replace(machine, memory_bytes=min(limit, machine.memory_bytes))
        return fit(
            self.job("lora"), within, runtime_bytes=self.runtime_bytes, rank=self.config.rank,
            batch_tokens=self.settings.batch_tokens, max_length=self.settings.max_length,
            longest=self.stats.longest, time_factor=factor,
        )  # fmt: skip

    def rows(self, lora: dict[str, Any], full: dict[str, Any]) -> list[tuple[str, str, str, str]]:
        """The table: what, for LoRA, for full fine-tuning, and why."""
        largest = lora["largest_pass"]
        by_layer = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in lora["by_layer"].items())
        why = {
            "weights_bytes": f"{self.decoder.params:,} of {self.decoder.itemsize} bytes",
            "adapter_bytes": "Σ rank·(in + out), float32",
            "gradient_bytes": "one for each trained number",
            "optimizer_bytes": "Adam: two moments each",
            "activation_bytes": f"{largest['rows']} x {largest['length']} slots; MiB in a layer: {by_layer}",
            "logits_bytes": f"of these, for {largest['supervised']:,} supervised tokens in chunks",
            "allocator_bytes": "holes in the heap between tensors of different sizes",
            "runtime_bytes": "Python, libraries, tokenizer and data, as measured here",
            "peak_bytes": "the worst moment",
            "checkpoint_bytes": "one finished task",
            "disk_bytes": "and the checkpoints that a run keeps",
        }
        table = [
            (name.removesuffix("_bytes"), _size(lora[name]), _size(full[name]), reason)
            for name, reason in why.items()
        ]
        table += [
            (
                "FLOPs",
                f"{lora['flops']:.2e}",
                f"{full['flops']:.2e}",
                "4 or 6 per weight and token, attention, head",
            ),
            ("time", _time(lora["train_s"]), _time(full["train_s"]), f"{self.steps} optimizer steps"),
            ("fits", _yes(lora["fits"]), _yes(full["fits"]), ""),
        ]
        return table


def measured_factor(planned: Planned, machine: Machine, base: str, data: Path, *, dtype: str) -> float:
    """Measured over predicted time of real LoRA steps on this machine."""
    from lorasmith.bases import load_base
    from lorasmith.planning import estimate
    from lorasmith.train import read_metrics, train

    settings = replace(planned.settings, max_steps=MEASURED_STEPS, save_every=MEASURED_STEPS)
    with tempfile.TemporaryDirectory() as scratch:
        train(load_base(base, dtype=dtype), data, planned.config, settings, out=scratch, quiet=True)
        rows = [row for row in read_metrics(Path(scratch) / "metrics.jsonl") if "step_s" in row]
    # The first step also compiles kernels and grows the heap, so it says little about the rest.
    measured = rows[1:] or rows
    rate = sum(row["step_s"] for row in measured) / sum(row["tokens"] for row in measured)
    predicted = estimate(planned.job("lora"), machine, runtime_bytes=0).train_s
    tokens = (
        planned.stats.tokens * planned.steps / max(1, planned.stats.examples / planned.settings.batch_size)
    )
    return float(rate * tokens / predicted)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else gib(count)


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _yes(fits: bool) -> str:
    return "yes" if fits else "NO"
