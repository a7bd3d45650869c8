"""Generation: our engine beside stock transformers, PEFT and llama.cpp, interleaved in one run.

    python benchmarks/bench_infer.py [--quick] [--peers] [--piece core --piece batches …]

32 tokens after 64, greedy, on the built-in base in the dtype of this machine; adapters of rank 16 on all
linear layers. Every round runs each variant once, and rows hold medians over the rounds after the first.
Prints the rows and appends them to `benchmarks/records/infer.jsonl`.

Pieces: `core` (batch 1 and 16, prefill, merged, deterministic; with --peers PEFT too), `batches` (8 and 32;
with --peers llama.cpp where `llama_peer.py` finds it), `loading`, `memory` (base + k adapters, each k in a
process of its own).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent))  # however this file was loaded
import llama_peer
import record

from lorasmith.bases import load_base
from lorasmith.engine import Engine, Request
from lorasmith.formats import write_adapter
from lorasmith.inject import eject, extract, inject
from lorasmith.lora import Adapter, Factors, LoRAConfig

BASE, SEED, RANK = "smollm2-135m", 0, 16
PROMPT_TOKENS, NEW_TOKENS, ROWS, MOST_ROWS = 64, 32, 16, 32
PIECES = ("core", "batches", "loading", "memory")
MEMORY_COUNTS = (1, 16, 200)
ABOUT = {
    "what": f"{NEW_TOKENS} tokens after {PROMPT_TOKENS}, seconds",
    "base": BASE,
    "rank": RANK,
    "seed": SEED,
}

Variants = dict[str, Callable[[], object]]


def make_adapters(model: Any, count: int, *, seed: int = SEED) -> list[Adapter]:
    """Adapters that differ; B is small, so that the outputs stay sensible."""
    inject(model, LoRAConfig(rank=RANK, alpha=2 * RANK), seed=seed)
    first = extract(model)
    eject(model)
    generator = torch.Generator().manual_seed(seed)
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


def engines(base: Any, adapters: list[Adapter], rows: int, **options: Any) -> Engine:
    engine = Engine(base, rows, prefix_cache_bytes=0, **options)
    for i, adapter in enumerate(adapters):
        engine.add_adapter(f"a{i}", adapter)
    return engine


ONE: list[str | None] = ["a0"]
MIXED: list[str | None] = [f"a{i}" for i in range(ROWS)]


def core_variants(base: Any, adapters: list[Adapter], prompts: Prompts) -> Variants:
    engine = engines(base, adapters, ROWS)
    exact = engines(base, adapters, ROWS, deterministic=True)
    merged = engines(load_base(BASE), adapters, ROWS, merge_after_steps=1)  # it changes its base's weights

    def run(rows: int, names: list[str | None], new: int = NEW_TOKENS, which: Engine = engine):
        return lambda: ours(which, prompts, rows, names, new)

    return {
        "plain-1": run(1, [None]),
        "one-1": run(1, ONE),
        "merged-1": run(1, ONE, which=merged),
        "stock-1": lambda: stock(base.model, prompts, 1, NEW_TOKENS),
        "plain-16": run(ROWS, [None]),
        "one-16": run(ROWS, ONE),
        "mixed-16": run(ROWS, MIXED),
        "merged-16": run(ROWS, ONE, which=merged),
        "stock-16": lambda: stock(base.model, prompts, ROWS, NEW_TOKENS),
        "prefill-plain": run(ROWS, [None], 1),
        "prefill-one": run(ROWS, ONE, 1),
        "prefill-mixed": run(ROWS, MIXED, 1),
        "prefill-stock": lambda: stock_prefill(base.model, prompts, ROWS),
        "exact-plain-16": run(ROWS, [None], which=exact),
        "exact-mixed-16": run(ROWS, MIXED, which=exact),
    }


def batch_variants(base: Any, adapters: list[Adapter], prompts: Prompts, llama: Any) -> Variants:
    engine = engines(base, adapters, MOST_ROWS)
    variants: Variants = {}
    for rows in (1, 8, ROWS, MOST_ROWS):
        for name, names in (("plain", [None]), ("one", ONE), ("mixed", MIXED)):
            if rows > 1 or name != "mixed":
                variants[f"{name}-{rows}"] = functools.partial(ours, engine, prompts, rows, names, NEW_TOKENS)
        if rows in (8, MOST_ROWS):
            variants[f"stock-{rows}"] = functools.partial(stock, base.model, prompts, rows, NEW_TOKENS)
        if llama is not None:
            variants[f"llama-{rows}"] = functools.partial(llama, rows)
    return variants


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
    ("merged adapter / our plain base, batch 1", "merged-1", "plain-1", None, None),
    ("merged adapter / our plain base, batch 16", "merged-16", "plain-16", None, None),
    ("deterministic / fast, plain base, batch 16", "exact-plain-16", "plain-16", None, None),
    ("deterministic / fast, 16 adapters mixed", "exact-mixed-16", "mixed-16", None, None),
    ("16 adapters mixed / PEFT, 16 adapters mixed", "mixed-16", "peft-mixed-16", None, None),
    ("one adapter, batch 1 / PEFT", "one-1", "peft-one-1", None, None),
    ("one adapter, batch 16 / PEFT", "one-16", "peft-one-16", None, None),
    ("PEFT, 16 adapters mixed / stock base, batch 16", "peft-mixed-16", "stock-16", None, None),
    ("one adapter, batch 8 / stock transformers base", "one-8", "stock-8", None, None),
    ("one adapter, batch 32 / stock transformers base", "one-32", "stock-32", None, None),
    ("8 adapters mixed / our plain base, batch 8", "mixed-8", "plain-8", None, None),
    ("16 adapters mixed / our plain base, batch 32", "mixed-32", "plain-32", None, None),
    ("our plain base / llama.cpp plain base, batch 1", "plain-1", "llama-1", None, None),
    ("our plain base / llama.cpp plain base, batch 8", "plain-8", "llama-8", None, None),
    ("our plain base / llama.cpp plain base, batch 16", "plain-16", "llama-16", None, None),
    ("our plain base / llama.cpp plain base, batch 32", "plain-32", "llama-32", None, None),
    ("one adapter / llama.cpp plain base, batch 1", "one-1", "llama-1", None, None),
    ("16 adapters mixed / llama.cpp plain base, batch 16", "mixed-16", "llama-16", None, None),
    ("16 adapters mixed / llama.cpp plain base, batch 32", "mixed-32", "llama-32", None, None),
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


def memory_row(count: int) -> dict[str, Any]:
    """`measure_memory` in a process of its own, so that no freed page of another measurement is reused."""
    command = [sys.executable, __file__, "--measure-memory", str(count)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(said.splitlines()[-1])
    return {
        "what": f"memory of the base and {count} adapters of rank {RANK}, measured / predicted bytes",
        "ours": found["measured"],
        "peer": found["predicted"],
        "ratio": found["measured"] / found["predicted"],
        "parts": found["parts"],
    }


def measure_memory(count: int) -> dict[str, Any]:
    """What this process alone holds (its unique set) after `count` adapters were registered and served.

    Predicted from shapes: the weights (the embedding is read from its file, the rest from the packed copy, and
    counted once more where the kernel keeps the file's pages), keys and values, slots, and float32 factors.
    """
    _warm_up()
    before = _private_bytes()
    base = load_base(BASE)
    engine = Engine(base, ROWS, prefix_cache_bytes=0)
    first = make_adapters(base.model, 1)[0]
    for i in range(count):
        factors = {p: Factors(f.A, f.B, f.scaling * (1 + i / 1000)) for p, f in first.factors.items()}
        engine.add_adapter(f"a{i}", Adapter(first.config, factors))  # other bits: nothing is shared
    names: list[str | None] = [f"a{i}" for i in range(min(count, ROWS))]
    for _ in range(2):
        ours(engine, Prompts(), ROWS, names, 4)
    del first
    measured = _private_bytes() - before
    parts = engine.memory()
    embedding = base.model.get_input_embeddings().weight
    per_adapter = sum(
        RANK * sum(m.weight.shape) for n, m in base.model.named_modules() if n.endswith("_proj")
    )
    predicted = (
        max(parts["packed"], parts["base"])
        + embedding.numel() * embedding.element_size()
        + parts["kv_cache"]
        + count * per_adapter * 4
        + min(count, ROWS) * per_adapter * embedding.element_size()
    )
    return {"measured": measured, "predicted": predicted, "parts": parts}


def _warm_up() -> None:
    """What torch and its threads take in any case."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    x = torch.ones(512, 512)
    (x @ x).bfloat16().float().sum()


def _private_bytes() -> int:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_full_info().uss)


def timing_rows(
    base: Any, adapters: list[Adapter], pieces: Sequence[str], peers: bool, rounds: int
) -> list[dict]:
    """Rows of the pieces that are timed, and of loading."""
    prompts, rows = Prompts(), []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = [folder / str(i) for i in range(ROWS)]
        for adapter, path in zip(adapters, folders, strict=True):
            write_adapter(adapter, path)
        loading = None
        if "core" in pieces:
            variants = core_variants(base, adapters, prompts)
            if peers:
                other = load_base(BASE)  # PEFT changes its model; stock transformers must not feel it
                wrapped, loading = load_peft(other.model, folders)
                variants |= peft_variants(wrapped, prompts)
            rows += rows_of(interleaved(variants, rounds))
        elif peers and "loading" in pieces:
            loading = load_peft(load_base(BASE).model, folders)[1]
        if "loading" in pieces:
            rows.append(loading_row(base, folders, loading))
        if "batches" in pieces:
            rows += batch_rows(base, adapters, prompts, folder, peers, rounds)
    return rows


def batch_rows(
    base: Any, adapters: list[Adapter], prompts: Prompts, folder: Path, peers: bool, rounds: int
) -> list[dict[str, Any]]:
    llama = None
    if peers and llama_peer.is_there():
        llama = llama_peer.LlamaPeer(
            folder, prompt=PROMPT_TOKENS, new=NEW_TOKENS, rows=MOST_ROWS, threads=torch.get_num_threads()
        )
    try:
        times = interleaved(batch_variants(base, adapters, prompts, llama), rounds)
    finally:
        if llama is not None:
            llama.close()
    already = ("one-1", "plain-1", "one-16", "mixed-16", "plain-16")  # the piece `core` has these ratios
    return [
        row
        for row, (_, a, b, *_) in zip(
            rows_of(times), [t for t in TABLE if t[1] in times and t[2] in times], strict=True
        )
        if not (a in already and b in already)
    ]


def run(peers: bool = False, quick: bool = False, pieces: Sequence[str] = PIECES) -> list[dict[str, Any]]:
    """All rows. `peers` adds PEFT and llama.cpp, which take minutes; `quick` runs fewer rounds, no memory."""
    rows = []
    if set(pieces) - {"memory"}:
        base = load_base(BASE)
        rows += timing_rows(base, make_adapters(base.model, ROWS), pieces, peers, 2 if quick else 4)
    if "memory" in pieces and not quick:
        rows += [memory_row(count) for count in MEMORY_COUNTS]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--piece", action="append", choices=PIECES)
    parser.add_argument("--measure-memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_memory is not None:
        print(json.dumps(measure_memory(options.measure_memory)))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = run(options.peers, options.quick, options.piece or PIECES)
    about = {**ABOUT, "dtype": str(load_base(BASE).model.dtype).removeprefix("torch.")}
    path = record.append("infer", rows, {**about, "quick": options.quick, "peers": options.peers})
    for row in rows:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.3f}"
        print(f"{row['what']:<62} {ratio:>7}   at least {row.get('at_least')}, aim {row.get('aim')}")
    print(f"recorded in {path}")


if __name__ == "__main__":
    main()
