"""A prefix takes positions from the text, and time from every pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorasmith.baselines import Tuned, applied, make_method
from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.mechanics.start import random_ids
from lorasmith.claims.timing import Ratio, conditions, interleaved, ratio
from lorasmith.drawing import GREY, ORANGE, TEAL, label, panels

QUICK_LENGTHS, FULL_LENGTHS, TEXT = (16, 64, 256), (16, 64, 128, 256, 512), 64
BASE = "no prefix"


def measure(setting: Setting) -> Measured:
    """Positions that are left, and the time of a pass, by length of the prefix."""
    lengths, seconds = (QUICK_LENGTHS, 10) if setting.quick else (FULL_LENGTHS, 25)
    key = {"claim": "prefix", "version": 1, "lengths": list(lengths), "text": TEXT, "s": seconds}
    found = setting.cached(key, lambda: _measure(setting, lengths, seconds))
    rows = []
    for n in lengths:
        r = ratio(found["times"][str(n)], found["times"][BASE])
        rows.append(
            {"prefix": n, "context left": found["context"] - n, "of context": 1 - n / found["context"]}
            | {"first position of the text": found["first"][str(n)], "cache bytes": found["cache"] * n}
            | {"time": r.median, "low": r.low, "high": r.high}
        )
    exact = all(row["first position of the text"] == row["prefix"] for row in rows)
    last = rows[-1]
    rising = last["low"] > 1 and last["time"] == max(row["time"] for row in rows)
    below = last["high"] < 1
    verdict = Holds.NO if not exact or below else Holds.YES if rising else Holds.NOT_AT_THIS_SCALE
    said = (
        f"A prefix of {last['prefix']} leaves {last['context left']:,} of {found['context']:,} positions ({last['of context']:.1%}), exactly as many fewer as it is "
        f"long; a pass over {TEXT} tokens takes {Ratio(last['time'], last['low'], last['high'])} times as long, and with {rows[0]['prefix']} "
        f"{Ratio(rows[0]['time'], rows[0]['low'], rows[0]['high'])}. Each sequence's cache grows by {found['cache']:,} bytes a virtual token."
    )
    return Measured(verdict, said, {"context": found["context"]}, rows)


def _measure(setting: Setting, lengths: tuple[int, ...], seconds: float) -> dict[str, Any]:
    base = setting.load()
    model: Any = base.model
    ids = random_ids(model, 1, TEXT)
    tuned = {n: _prefix(model, n) for n in lengths}

    @contextmanager
    def with_prefix(n: int) -> Iterator[Any]:
        with applied(model, tuned[n]):
            yield run

    @contextmanager
    def without() -> Iterator[Any]:
        yield run

    def run() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    with torch.no_grad():
        first = {str(n): _first_position(model, tuned[n]) for n in lengths}
        arms = {BASE: without} | {str(n): partial(with_prefix, n) for n in lengths}
        times = interleaved(arms, seconds=seconds)
    per_token = sum(t.numel() for t in tuned[lengths[0]].tensors.values()) // lengths[0]
    context = int(model.config.max_position_embeddings)
    cache = per_token * int(next(model.parameters()).element_size())
    return {"times": times, "first": first, "context": context, "cache": cache, **conditions()}


def _prefix(model: Any, n: int) -> Tuned:
    options = {"virtual_tokens": n, "prefix_hidden": 64, "init_text": None}
    method = make_method("prefix", options)
    method.attach(model, seed=0)
    tensors = {name: t.clone() for name, t in method.tensors(model).items()}
    method.detach(model)
    return Tuned("prefix", options, tensors)


def _first_position(model: Any, tuned: Tuned) -> int:
    """Position that the model gives to the text's first token."""
    seen: list[int] = []
    with applied(model, tuned):
        hook = model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(int(kwargs["position_ids"][0, 0])), with_kwargs=True
        )
        model(input_ids=random_ids(model, 1, 4), use_cache=False)
        hook.remove()
    return seen[0]


def draw(found: Measured, path: Path) -> None:
    """Context left, and time, by length of the prefix."""
    rows = found.rows
    n = [r["prefix"] for r in rows]
    with panels(path, 2, width=4.5, height=2.8) as (left, right):
        left.plot(n, [r["context left"] for r in rows], "o-", color=TEAL)
        left.axhline(found.figures["context"], color=GREY, linewidth=1)
        label(left, "positions left for the text", "virtual tokens")
        errors = [[r["time"] - r["low"] for r in rows], [r["high"] - r["time"] for r in rows]]
        right.errorbar(n, [r["time"] for r in rows], errors, fmt="o-", color=ORANGE, capsize=3)
        right.axhline(1, color=GREY, linewidth=1)
        label(right, f"time of a pass over {TEXT} tokens, without = 1", "virtual tokens")


PREFIX = Claim(
    id="prefix-context",
    title="A prefix takes context and time",
    claim="Reserving part of the sequence for a prefix shortens what is left for the task, and every pass attends to it.",
    source="Hu et al. 2021, §3",
    design=f"Prefixes of {', '.join(map(str, FULL_LENGTHS))} virtual tokens (quick: {', '.join(map(str, QUICK_LENGTHS))}); the position that the model gives to the text's first token is "
    f"read out. A forward pass over 1 × {TEXT} tokens is timed with and without, in turns; median of the rounds' ratios, 95 % bootstrap interval. Holds if the text begins "
    "exactly at the prefix's length, the longest one takes the most time and its interval lies above 1.",
    expected="n_ctx − l_p positions left; time grows with l_p; LoRA (merged): all positions, no time",
    measure=measure,
    draw=draw,
)
