"""For the engine's tests: tiny bases with adapters, and a runner that does no arithmetic."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lorasmith.engine import Engine, Request
from lorasmith.engine.cache import KVCache, KVShape
from lorasmith.engine.prefix import PrefixCache
from lorasmith.engine.runner import Batch
from lorasmith.engine.scheduler import Scheduler
from lorasmith.engine.slots import GroupSpec, Slots
from lorasmith.inject import eject, extract, inject
from lorasmith.lora import Adapter, LoRAConfig
from tests.support.models import randomise, tiny_causal_lm, tokens


def tiny_base(family: str = "llama", *, tokenizer: Any = None, stops: tuple[int, ...] = (), **options: Any):
    return SimpleNamespace(
        model=tiny_causal_lm(family, **options), tokenizer=tokenizer, stop_token_ids=stops, name=family
    )


def make_adapter(model: Any, seed: int, **config: Any) -> Adapter:
    inject(model, LoRAConfig(**config), seed=seed)
    adapter = randomise(extract(model), seed=seed)
    eject(model)
    return adapter


def mixed_adapters(model: Any) -> dict[str, Adapter]:
    """Other ranks, scalings, rank patterns and targets in each."""
    last = "c_proj" if type(model).__name__.startswith("GPT2") else "down_proj"
    first = "c_attn" if type(model).__name__.startswith("GPT2") else "q_proj"
    return {
        "small": make_adapter(model, 1, rank=2, alpha=4),
        "large": make_adapter(model, 2, rank=9, alpha=6, rslora=True),
        "partial": make_adapter(model, 3, rank=3, alpha=12, targets=[first]),
        "pattern": make_adapter(model, 4, rank=4, targets=[first, last], rank_pattern={last: 7}),
        "one-layer": make_adapter(model, 5, rank=1, alpha=3, layers=[1]),
    }


def with_biases(model: Any, seed: int, **config: Any) -> Adapter:
    """An adapter whose biases trained too, which no stack of factors can hold."""
    config = {"rank": 3, "targets": ["q_proj", "v_proj"], "bias": "lora_only"} | config
    adapter = make_adapter(model, seed, **config)
    generator = torch.Generator().manual_seed(seed)
    for bias in adapter.biases.values():
        bias.add_(torch.randn(bias.shape, generator=generator, dtype=torch.float64).to(bias.dtype) * 0.5)
    return adapter


def engine_of(base: Any, adapters: Mapping[str, Adapter] | None = None, **options: Any) -> Engine:
    engine = Engine(base, **options)
    for name, adapter in (adapters or {}).items():
        engine.add_adapter(name, adapter)
    return engine


def some_requests(names: Iterable[str], count: int = 11, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    choices = [None, *names]
    return [
        Request(
            tokens(1, rng.randint(1, 25), seed=100 * seed + i)[0].tolist(),
            adapter=choices[i % len(choices)],
            max_tokens=rng.randint(1, 9),
        )
        for i in range(count)
    ]


def greedy(model: Any, request: Request) -> tuple[int, ...]:
    """transformers' own forward over the whole sequence again for every token; no cache at all."""
    ids = list(request.prompt)
    for _ in range(request.max_tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(request.prompt) :])


class CountingRunner:
    """The next token is the last one plus one, and the cache holds the tokens themselves.

    So a row that reads a neighbour's cache, or its own at a wrong place, is seen at once.
    """

    name = "counting"
    model = None
    vocab_size = 50
    max_positions = None
    is_row_invariant = False
    is_solo = False

    def __init__(self, max_rows: int, max_tokens: int = 256) -> None:
        dims = ((1, 1),)
        self.cache = KVCache(KVShape(dims, dims, torch.float32, torch.device("cpu")), max_rows)
        self.cache.limit(1 << 30, max_tokens)
        self.slots = Slots([GroupSpec(("x",), 2, (2,))], torch.float32, torch.device("cpu"))
        self.poison: int | None = None
        self.batches: list[Batch] = []
        self.history: dict[int, list[int]] = {}

    def refresh(self) -> None: ...

    def forward(self, batch: Batch) -> Tensor:
        self.batches.append(batch)
        new = batch.tokens.shape[1]
        self.cache.reserve(max(batch.starts) + new)
        logits = torch.zeros(len(batch.rows), self.vocab_size)
        for line, (row, start, length) in enumerate(
            zip(batch.rows, batch.starts, batch.lengths, strict=True)
        ):
            tokens = batch.tokens[line, :length]
            if self.poison is not None and self.poison in tokens.tolist():
                raise RuntimeError("poisoned")
            self.cache.keys[0][row, start : start + length, 0, 0] = tokens.float()
            seen = self.cache.keys[0][row, : start + length, 0, 0].long().tolist()
            assert seen == list(range(seen[0], seen[0] + len(seen))), f"row {row} reads {seen}"
            logits[line, int(tokens[-1]) + 1] = 1.0
        return logits


def counting_scheduler(max_rows: int = 4, *, chunk_tokens: int = 8) -> Scheduler:
    return Scheduler(CountingRunner(max_rows), PrefixCache(0), max_rows=max_rows, chunk_tokens=chunk_tokens)
