"""A run as `plan` sees it: the base's skeleton, the data's lengths, and the passes they make."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasmith.errors import BudgetError
from lorasmith.planning import Decoder, Estimate, Fit, Job, Machine, Pass, Trained, gib

if TYPE_CHECKING:
    import torch

    from lorasmith.bases import Skeleton
    from lorasmith.data import Encoded, RecordSet, Steps
    from lorasmith.lora import LoRAConfig
    from lorasmith.train import Layout, TrainConfig

Method = Literal["lora", "full"]
MEASURED_STEPS = 6
LEAST_LENGTH = 64


@dataclass(frozen=True)
class Planned:
    """One run before it starts.

    Attributes:
        skeleton: the base without its numbers.
        trained: what LoRA would train.
        steps: optimizer steps in all.
        runtime_bytes: what this very process holds without weights.
        processes: that share each step; all figures are of one of them.
    """

    name: str
    skeleton: Skeleton
    tokenizer: Any
    records: RecordSet
    config: LoRAConfig
    settings: TrainConfig
    dtype: torch.dtype
    decoder: Decoder
    trained: Trained
    encoded: Encoded
    order: Steps
    layout: Layout
    runtime_bytes: int
    processes: int = 1

    @classmethod
    def read(
        cls,
        base: str,
        data: Path,
        config: LoRAConfig,
        settings: TrainConfig,
        *,
        dtype: str,
        quantize: str | None = None,
        processes: int = 1,
    ) -> Planned:
        """Build the skeleton, encode the data and lay out its steps."""
        from lorasmith.bases import load_skeleton, load_tokenizer, pick_dtype
        from lorasmith.data import read_records
        from lorasmith.planning import decoder_of, resident_bytes, trim_heap

        chosen, skeleton, tokenizer = pick_dtype(dtype), load_skeleton(base), load_tokenizer(base)
        records = read_records(data)
        encoded, order, layout = _laid_out(skeleton.model, tokenizer, records, config, settings)
        trim_heap()
        return cls(
            name=base,
            skeleton=skeleton,
            tokenizer=tokenizer,
            records=records,
            config=config,
            settings=settings,
            dtype=chosen,
            decoder=decoder_of(skeleton.model, itemsize=chosen.itemsize, quantize=quantize),
            trained=_trained(skeleton.model, config),
            encoded=encoded,
            order=order,
            layout=layout,
            runtime_bytes=resident_bytes(),
            processes=processes,
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return min(len(self.order), self.settings.max_steps or len(self.order))

    def with_length(self, max_length: int) -> Planned:
        """The same run with sequences cut to fewer tokens."""
        settings = replace(self.settings, max_length=max_length)
        encoded, order, layout = _laid_out(
            self.skeleton.model, self.tokenizer, self.records, self.config, settings
        )
        return replace(self, settings=settings, encoded=encoded, order=order, layout=layout)

    def job(self, method: Method) -> Job:
        """The run as planning takes it."""
        from lorasmith.train import computing_of

        even, worst = self._passes(self.settings.batch_tokens)
        return Job(
            self.decoder, self.trained if method == "lora" else Trained(None), even, self.steps, worst,
            computing=computing_of(self.skeleton.model, self.settings, self.dtype),
            file_itemsize=self.skeleton.file_itemsize,
            is_mapped=self.skeleton.file_itemsize == self.decoder.itemsize,
            gives_back=self.settings.budget_bytes is not None,
            keeps_weights=self.settings.keeps_weights or method == "full",
            sharded_over=self.processes if self._is_spread(method) else 1,
            spreads_trained=self._is_spread(method) and self.settings.shard == "all",
        )  # fmt: skip

    def _is_spread(self, method: Method) -> bool:
        whole = ("none", "base") if method == "full" else ("none",)
        return self.processes > 1 and self.settings.shard not in whole

    def _passes(self, batch_tokens: int) -> tuple[list[list[Pass]], list[list[Pass]]]:
        from lorasmith.train import World, passes_of

        return passes_of(
            self.layout, self.encoded.examples, self.order, total=self.steps, batch_tokens=batch_tokens,
            world=World(size=self.processes),
        )  # fmt: skip

    def estimate(self, machine: Machine, method: Method, factor: float) -> Estimate:
        """Memory, operations and time of one method."""
        from lorasmith.planning import estimate

        return estimate(self.job(method), machine, runtime_bytes=self.runtime_bytes, time_factor=factor)

    def fit(self, machine: Machine, limit: int | None, factor: float) -> Fit:
        """Settings that fit `limit` and the machine, whichever is smaller; sequences are cut last.

        Raises:
            BudgetError: nothing fits.
        """
        within = machine if limit is None else replace(machine, memory_bytes=min(limit, machine.memory_bytes))
        length = min(self.settings.max_length, self.encoded.stats.longest)
        refusal: BudgetError | None = None
        for shorter in (length >> k for k in range(12)):
            if shorter < LEAST_LENGTH and refusal is not None:
                break
            run = self if refusal is None else self.with_length(shorter)
            try:
                found = run._fit(within, shorter if refusal else self.settings.max_length, factor)
            except BudgetError as error:
                refusal = error
                continue
            if refusal is None:
                return found
            return replace(
                found, reason=f"{found.reason}; max_length {shorter}: longer prompts lose their beginning"
            )
        assert refusal is not None
        raise refusal

    def _fit(self, within: Machine, max_length: int, factor: float) -> Fit:
        from lorasmith.planning import fit
        from lorasmith.train import RECOMPUTES

        asked = self.settings.recompute
        return fit(
            self.job("lora"), within, self._passes,
            runtime_bytes=self.runtime_bytes, rank=self.config.rank, batch_tokens=self.settings.batch_tokens,
            max_length=max_length, recomputes=RECOMPUTES if asked == "auto" else (asked,), least_rank=1,
            time_factor=factor,
        )  # fmt: skip

    def _held_as(self) -> str:
        if self.decoder.packed is not None:
            return f"; for LoRA {self.decoder.packed.params:,} of them as {self.decoder.packed.kind}"
        return f", layers spread over {self.processes} processes" if self._is_spread("lora") else ""

    def rows(self, lora: dict[str, Any], full: dict[str, Any]) -> list[tuple[str, str, str, str]]:
        """The table: what, for LoRA, for full fine-tuning, and why."""
        largest = lora["largest_pass"]
        by_layer = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in lora["by_layer"].items())
        why = {
            "weights_bytes": f"{self.decoder.params:,} of {self.decoder.itemsize} bytes" + self._held_as(),
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

    settings = replace(
        planned.settings, max_steps=MEASURED_STEPS, save_every=MEASURED_STEPS, budget_bytes=None
    )
    with tempfile.TemporaryDirectory() as scratch:
        train(load_base(base, dtype=dtype), data, planned.config, settings, out=scratch, quiet=True)
        rows = [row for row in read_metrics(Path(scratch) / "metrics.jsonl") if "step_s" in row]
    tokens = (
        planned.encoded.stats.tokens
        * planned.steps
        / max(1, planned.encoded.stats.examples / planned.settings.batch_size)
    )
    predicted = estimate(planned.job("lora"), machine, runtime_bytes=0).train_s
    return seconds_of_run(rows, tokens) / predicted


def seconds_of_run(rows: Sequence[Mapping[str, Any]], tokens: float) -> float:
    """Seconds that so many tokens take, from the first steps of a run, each with its `step_s` and `tokens`.

    The first step compiles kernels and grows the heap: what it took beyond the others' rate is counted once. The
    others' mean, not their median: steps of new shapes compile too, and go on doing so.
    """
    first, others = rows[0], rows[1:] or rows
    rate = sum(row["step_s"] for row in others) / sum(row["tokens"] for row in others)
    return float(rate * tokens + max(0.0, first["step_s"] - rate * first["tokens"]))


def _trained(model: Any, config: LoRAConfig) -> Trained:
    from lorasmith.inject import resolve_targets
    from lorasmith.planning import decoder_of

    linears, modules = decoder_of(model).linears, dict(model.named_modules())
    chosen = {path: config.rank_of(path) for path in resolve_targets(model, config).chosen}
    other = 0
    for path, rank in chosen.items():
        weight = getattr(modules.get(path), "weight", None)
        if path not in linears and weight is not None:
            other += rank * (weight.shape[0] + weight.numel() // weight.shape[0])
    return Trained({path: rank for path, rank in chosen.items() if path in linears}, other)


def _laid_out(
    model: Any, tokenizer: Any, records: RecordSet, config: LoRAConfig, settings: TrainConfig
) -> tuple[Encoded, Steps, Layout]:
    from lorasmith.data import encode, steps
    from lorasmith.train import choose_layout

    encoded = encode(records, tokenizer, max_length=settings.max_length)
    order = steps(
        encoded.examples, batch_size=settings.batch_size, epochs=settings.epochs, seed=settings.seed,
        shuffle=settings.shuffle,
    )  # fmt: skip
    total = min(len(order), settings.max_steps or len(order))
    window = getattr(model.config, "sliding_window", None)
    layout = choose_layout(
        settings.packing, encoded.examples, [order[k] for k in range(min(total, order.per_epoch))],
        can_mask=window is None or window >= encoded.stats.longest, dropout=config.dropout,
    )  # fmt: skip
    return encoded, order, layout


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
