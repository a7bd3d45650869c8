"""Generation: our engine beside stock transformers and PEFT, interleaved in one process.

    python benchmarks/bench_infer.py [--quick] [--peers]

32 tokens after 64, greedy, on the built-in base in the dtype of this machine; adapters of rank 16 on all
linear layers. Every round runs each variant once, and rows hold medians over the rounds after the first.
Prints the rows as JSON and appends them to `benchmarks/records/infer.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from lorasmith.bases import load_base
from lorasmith.engine import Engine, Request
from lorasmith.formats import write_adapter
from lorasmith.inject import eject, extract, inject
from lorasmith.lora import Adapter, Factors, LoRAConfig

RECORDS = Path(__file__).parent / "records" / "infer.jsonl"
BASE, SEED, RANK = "smollm2-135m", 0, 16
PROMPT_TOKENS, NEW_TOKENS, ROWS = 64, 32, 16

Variants = dict[str, Callable[[], object]]


def make_adapters(model: Any, count: int) -> list[Adapter]:
    """Adapters that differ; B is small, so that the outputs stay sensible."""
    inject(model, LoRAConfig(rank=RANK, alpha=2 * RANK), seed=SEED)
    first = extract(model)
    eject(model)
    generator = torch.Generator().manual_seed(SEED)
    return [
        Adapter(
            first.config,
            {
                path: Factors(f.A.clone(), torch.randn(f.B.shape, generator=generator) * 0.005, f.scaling)
                for path, f in first.factors.items()
            },
        )
        for _ in range(count)
    ]


class Prompts:
    """New random prompts for every run, so that no prefix is ever reused."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(SEED)

    def __call__(self, rows: int) -> torch.Tensor:
        return torch.randint(1000, 40000, (rows, PROMPT_TOKENS), generator=self.generator)


def ours(engine: Engine, prompts: Prompts, rows: int, names: list[str | None], new: int) -> None:
    engine.generate(
        [
            Request(ids, adapter=names[i % len(names)], max_tokens=new, ignore_eos=True)
            for i, ids in enumerate(prompts(rows).tolist())
        ]
    )


def stock(model: Any, prompts: Prompts, rows: int, new: int, **options: Any) -> None:
    ids = prompts(rows)
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **options,
        )


def stock_prefill(model: Any, prompts: Prompts, rows: int) -> None:
    """The last logits, as the engine computes them.

    `logits_to_keep=1` would hand the frozen head a slice that is not contiguous, which copies its weight
    once per row (2.4 times as slow here), so the head is called on a contiguous one.
    """
    with torch.inference_mode():
        hidden = model.model(prompts(rows), use_cache=True).last_hidden_state
        model.lm_head(hidden[:, -1].contiguous())


def engine_variants(engine: Engine, exact: Engine, model: Any, prompts: Prompts) -> Variants:
    one: list[str | None] = ["a0"]
    mixed: list[str | None] = [f"a{i}" for i in range(ROWS)]

    def run(rows: int, names: list[str | None], new: int = NEW_TOKENS, which: Engine = engine):
        return lambda: ours(which, prompts, rows, names, new)

    return {
        "plain-1": run(1, [None]),
        "one-1": run(1, one),
        "stock-1": lambda: stock(model, prompts, 1, NEW_TOKENS),
        "plain-16": run(ROWS, [None]),
        "one-16": run(ROWS, one),
        "mixed-16": run(ROWS, mixed),
        "stock-16": lambda: stock(model, prompts, ROWS, NEW_TOKENS),
        "prefill-plain": run(ROWS, [None], 1),
        "prefill-one": run(ROWS, one, 1),
        "prefill-mixed": run(ROWS, mixed, 1),
        "prefill-stock": lambda: stock_prefill(model, prompts, ROWS),
        "exact-mixed-16": run(ROWS, mixed, which=exact),
    }


def interleaved(variants: Variants, rounds: int) -> dict[str, float]:
    """Median seconds of each variant; the first round warms up and is left out."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


TABLE = [
    # what, ours, peer, at least, aim
    ("one adapter, batch 1 / stock transformers base", "one-1", "stock-1", 0.55, 0.25),
    ("one adapter, batch 16 / stock transformers base", "one-16", "stock-16", 0.80, 0.50),
    ("16 adapters mixed / stock transformers base, batch 16", "mixed-16", "stock-16", 0.90, 0.45),
    ("16 adapters mixed / our plain base, batch 16", "mixed-16", "plain-16", 1.25, 1.10),
    ("prefill, one adapter / stock base, batch 16, last logits", "prefill-one", "prefill-stock", 1.05, 0.90),
    (
        "prefill, 16 adapters / stock base, batch 16, last logits",
        "prefill-mixed",
        "prefill-stock",
        None,
        None,
    ),
    ("one adapter / our plain base, batch 1", "one-1", "plain-1", None, None),
    ("one adapter / our plain base, batch 16", "one-16", "plain-16", None, None),
    ("deterministic / fast, 16 adapters mixed", "exact-mixed-16", "mixed-16", None, None),
    ("16 adapters mixed / PEFT, 16 adapters mixed", "mixed-16", "peft-mixed-16", None, None),
    ("one adapter, batch 1 / PEFT", "one-1", "peft-one-1", None, None),
    ("one adapter, batch 16 / PEFT", "one-16", "peft-one-16", None, None),
    ("PEFT, 16 adapters mixed / stock base, batch 16", "peft-mixed-16", "stock-16", None, None),
]


def rows_of(times: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "what": what,
            "ours": times[a],
            "peer": times[b],
            "ratio": times[a] / times[b],
            "at_least": least,
            "aim": aim,
        }
        for what, a, b, least, aim in TABLE
        if a in times and b in times
    ]


def load_peft(model: Any, folders: list[Path]) -> tuple[Any, float]:
    """PEFT's model with every adapter, and the seconds that loading took."""
    import peft

    start = time.perf_counter()
    wrapped = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="a0")
    for i, folder in enumerate(folders[1:], 1):
        wrapped.load_adapter(folder, adapter_name=f"a{i}")
    seconds = time.perf_counter() - start
    wrapped.set_adapter("a0")
    return wrapped.eval(), seconds


def peft_variants(wrapped: Any, prompts: Prompts) -> Variants:
    names = [f"a{i}" for i in range(ROWS)]
    return {
        "peft-one-1": lambda: stock(wrapped, prompts, 1, NEW_TOKENS),
        "peft-one-16": lambda: stock(wrapped, prompts, ROWS, NEW_TOKENS),
        "peft-mixed-16": lambda: stock(wrapped, prompts, ROWS, NEW_TOKENS, adapter_names=names),
    }


def loading_row(base: Any, folders: list[Path], peer: float | None) -> dict[str, Any]:
    times = []
    for _ in range(3):
        engine = Engine(base, pack_weights=False)
        start = time.perf_counter()
        engine.add_adapters({f"a{i}": folder for i, folder in enumerate(folders)})
        times.append(time.perf_counter() - start)
    mine = statistics.median(times)
    return {
        "what": f"loading and validating {len(folders)} adapters / PEFT",
        "ours": mine,
        "peer": peer,
        "ratio": mine / peer if peer else None,
        "at_least": 0.10,
        "aim": 0.04,
    }


def memory_rows(base: Any, adapters: list[Adapter]) -> list[dict[str, Any]]:
    """Resident memory that k registered adapters add, beside the bytes of their factors."""
    rows = []
    for count in (1, 16, 200):
        engine = Engine(base, pack_weights=False, prefix_cache_bytes=0)
        before = psutil.Process().memory_info().rss
        for i in range(count):
            scale = 1 + i / 1000  # other bits, so that nothing is shared
            source = adapters[i % len(adapters)]
            factors = {p: Factors(f.A, f.B, f.scaling * scale) for p, f in source.factors.items()}
            engine.add_adapter(f"m{i}", Adapter(source.config, factors))
        found = psutil.Process().memory_info().rss - before
        predicted = count * adapters[0].num_bytes
        rows.append(
            {
                "what": f"memory of {count} registered adapters, measured / predicted bytes",
                "ours": found,
                "peer": predicted,
                "ratio": found / predicted,
            }
        )
    return rows


def run(peers: bool = False, quick: bool = False) -> list[dict[str, Any]]:
    """All rows. `peers` adds PEFT, which takes minutes; `quick` runs fewer rounds and no memory table."""
    base, prompts = load_base(BASE), Prompts()
    adapters = make_adapters(base.model, ROWS)
    engine, exact = Engine(base, prefix_cache_bytes=0), Engine(base, deterministic=True, prefix_cache_bytes=0)
    for i, adapter in enumerate(adapters):
        engine.add_adapter(f"a{i}", adapter)
        exact.add_adapter(f"a{i}", adapter)
    variants = engine_variants(engine, exact, base.model, prompts)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = [folder / str(i) for i in range(ROWS)]
        for adapter, path in zip(adapters, folders, strict=True):
            write_adapter(adapter, path)
        peer_loading = None
        if peers:
            other = load_base(BASE)  # PEFT changes its model; stock transformers must not feel it
            wrapped, peer_loading = load_peft(other.model, folders)
            variants |= peft_variants(wrapped, prompts)
        times = interleaved(variants, 2 if quick else 4)
        rows = [*rows_of(times), loading_row(base, folders, peer_loading)]
    if not quick:
        rows += memory_rows(base, adapters)
    return rows


def record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RECORDS.parent.parent
    ).stdout.strip()
    return {
        "what": f"{NEW_TOKENS} tokens after {PROMPT_TOKENS}, seconds",
        "base": BASE,
        "rank": RANK,
        "rows": rows,
        "device": f"cpu {_cpu_name()}",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "dtype": str(load_base(BASE).model.dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        },
        "commit": commit or "uncommitted",
        "seed": SEED,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "cpu family", "model\t")
    return ", ".join(
        dict.fromkeys(line.partition(":")[2].strip() for line in lines if line.startswith(wanted))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = record(run(options.peers, options.quick))
    RECORDS.parent.mkdir(exist_ok=True)
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    for row in result["rows"]:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.3f}"
        print(f"{row['what']:<62} {ratio:>7}   at least {row.get('at_least')}, aim {row.get('aim')}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
