"""Random batches with random arrivals and cancels: every row against the row alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lorasmith.engine import Request, Result
from tests.support.engines import engine_of, mixed_adapters, tiny_base, with_biases
from tests.support.models import tokens
from tests.support.tolerance import close


def random_batches(
    base, adapters, seeds, temperatures=(0.0, 0.8), **options: Any
) -> Iterator[tuple[Request, Result, Result]]:
    """Each request with its result in company and its result alone."""
    names = list(adapters)
    together = engine_of(base, adapters, max_rows=5, **options)
    alone = engine_of(base, adapters, max_rows=5, **options)
    solo: dict[Request, Result] = {}
    for seed in seeds:
        rng = random.Random(seed)
        pool = [
            Request(
                tuple(tokens(1, rng.choice([1, 3, 9, 30, 70]), seed=rng.randrange(8))[0].tolist()),
                adapter=rng.choice([None, *names]),
                max_tokens=rng.randint(1, 6),
                temperature=rng.choice(temperatures),
                seed=rng.randrange(3),
                logprobs=True,
            )
            for _ in range(rng.randint(1, 8))
        ]
        handles = []
        for request in pool:
            handles.append(together.submit(request))
            for _ in range(rng.randrange(3)):
                together.step()
            if rng.random() < 0.1:
                rng.choice(handles).cancel()
        while together.step():
            pass
        for request, handle in zip(pool, handles, strict=True):
            if request not in solo:
                solo[request] = alone.generate([request])[0]
            yield request, handle.result(0), solo[request]
    together.close()
    alone.close()


def check_bits(base, adapters, seeds, **options: Any) -> None:
    for _, result, alone in random_batches(base, adapters, seeds, deterministic=True, **options):
        count = len(result.token_ids)
        assert result.finish_reason in ("length", "cancelled")
        assert result.token_ids == alone.token_ids[:count]
        assert result.logprobs == alone.logprobs[:count]
        if result.finish_reason == "length":
            assert count == len(alone.token_ids)


def check_close(base, adapters, seeds, dtype: torch.dtype) -> None:
    """Until two tokens differ, which near-ties may (then the two were equally probable)."""
    compared = 0
    for request, result, alone in random_batches(base, adapters, seeds, temperatures=(0.0,)):
        assert result.finish_reason in ("length", "cancelled")
        pairs = list(zip(result.token_ids, alone.token_ids, strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs) - 1) + 1
        got, expected = (torch.tensor(r.logprobs[:same], dtype=torch.float64) for r in (result, alone))
        # A log-probability carries the rounding of the logits that it is the difference of; here they reach 10.
        close(got / 10, expected / 10, dtype)
        compared += same
        assert result.finish_reason == "cancelled" or len(result.token_ids) == request.max_tokens
    assert compared > 100


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("gemma2", torch.bfloat16), ("qwen3", torch.bfloat16)],
)
def test_deterministic_rows_have_their_own_bits(family, dtype):
    base = tiny_base(family, dtype=dtype)
    check_bits(base, mixed_adapters(base.model), range(10))


def test_deterministic_rows_have_their_own_bits_beside_adapters_that_are_served_alone():
    base = tiny_base("qwen2", dtype=torch.bfloat16)
    check_bits(base, mixed_adapters(base.model) | {"biased": with_biases(base.model, 7)}, range(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_rows_are_within_the_table_of_the_row_alone(dtype):
    base = tiny_base(dtype=dtype)
    check_close(base, mixed_adapters(base.model), range(25), dtype)


def test_a_thousand_random_batches_bit_for_bit():
    base = tiny_base(dtype=torch.bfloat16)
    check_bits(base, mixed_adapters(base.model), range(1000, 2000))


@pytest.mark.slow
def test_a_thousand_random_batches_in_fast_mode_within_the_table():
    base = tiny_base(dtype=torch.float32)
    check_close(base, mixed_adapters(base.model), range(1000, 2000), torch.float32)
