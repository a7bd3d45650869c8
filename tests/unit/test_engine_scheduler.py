"""The scheduler over a runner without arithmetic: who runs when, and what a fault may touch."""

from __future__ import annotations

import random

import pytest
import torch

from lorasmith.engine import Request, TokenEvent
from lorasmith.engine.prefix import Owner
from lorasmith.engine.rows import Handle, Row
from lorasmith.engine.sampling import Sampler
from lorasmith.engine.text import TextStream
from tests.support.engines import counting_scheduler


def row(start: int, length: int, max_tokens: int, on_token=None, stops=frozenset()) -> Row:
    request = Request(list(range(start, start + length)), max_tokens=max_tokens)
    return Row(
        request=request,
        prompt=list(request.prompt),
        generation=None,
        owner=Owner("b", None, ""),
        sampler=Sampler.of(request),
        stream=TextStream(None),
        stop_token_ids=stops,
        on_token=on_token,
        handle=Handle(lambda: None),
    )


def expected(r: Row) -> list[int]:
    return list(range(r.prompt[-1] + 1, r.prompt[-1] + 1 + r.request.max_tokens))


def drain(scheduler, limit: int = 2000) -> None:
    for _ in range(limit):
        if scheduler.is_idle:
            return
        scheduler.step()
    raise AssertionError("the scheduler did not come to an end")


@pytest.mark.parametrize("seed", range(20))
def test_random_arrivals_lengths_and_cancels_never_mix_rows(seed):
    rng = random.Random(seed)
    scheduler = counting_scheduler(max_rows=rng.choice([1, 2, 5]), chunk_tokens=rng.choice([1, 3, 16]))
    rows = [row(rng.randrange(8), rng.randint(1, 15), rng.randint(1, 12)) for _ in range(15)]
    later = list(rows)
    while later or not scheduler.is_idle:
        for _ in range(min(len(later), rng.randrange(3))):
            scheduler.waiting.append(later.pop(0))
        if rng.random() < 0.15:
            rng.choice(rows).handle.cancel()
        scheduler.step()
    for r in rows:
        assert r.finish_reason in ("length", "cancelled")
        assert r.token_ids == expected(r)[: len(r.token_ids)]
        if r.finish_reason == "length":
            assert r.token_ids == expected(r)


def test_a_long_prompt_is_computed_in_chunks_while_others_decode():
    scheduler = counting_scheduler(chunk_tokens=4)
    short, long = row(0, 2, 10), row(0, 20, 2)
    scheduler.waiting.append(short)
    scheduler.step()
    scheduler.waiting.append(long)
    for _ in range(5):
        before = len(short.token_ids)
        scheduler.step()
        assert len(short.token_ids) == before + 1
    assert long.token_ids == [20]


def test_cancel_takes_effect_within_one_step_running_or_waiting():
    scheduler = counting_scheduler(max_rows=1)
    first, second = row(0, 2, 30), row(0, 2, 30)
    scheduler.waiting.extend([first, second])
    scheduler.step()
    count = len(first.token_ids)
    first.handle.cancel()
    second.handle.cancel()
    ended = scheduler.step()
    assert set(map(id, ended)) == {id(first), id(second)}
    assert len(first.token_ids) == count
    assert second.token_ids == []


def test_a_poisoned_row_fails_alone_in_prefill_and_in_decode():
    scheduler = counting_scheduler(max_rows=4, chunk_tokens=64)
    scheduler.runner.poison = 30
    good = [row(0, 3, 8), row(4, 5, 8), row(10, 2, 8)]
    in_prefill, in_decode = row(28, 4, 3), row(26, 2, 9)
    scheduler.waiting.extend([good[0], in_prefill, good[1], in_decode, good[2]])
    drain(scheduler)
    for bad in (in_prefill, in_decode):
        assert bad.finish_reason == "error"
        assert "poisoned" in (bad.error or "")
    assert all(r.token_ids == expected(r) for r in good)


def test_logits_that_are_not_finite_fail_their_row_only():
    scheduler = counting_scheduler()
    forward = scheduler.runner.forward

    def with_nan(batch):
        logits = forward(batch)
        for line, length in enumerate(batch.lengths):
            if int(batch.tokens[line, length - 1]) == 9:
                logits[line, 0] = torch.nan
        return logits

    scheduler.runner.forward = with_nan
    good, bad = row(20, 2, 5), row(5, 3, 5)
    scheduler.waiting.extend([bad, good])
    drain(scheduler)
    assert bad.finish_reason == "error"
    assert good.token_ids == expected(good)


def test_a_callback_that_raises_ends_its_own_request():
    def boom(event: TokenEvent) -> None:
        raise ValueError("listener gone")

    scheduler = counting_scheduler()
    bad, good = row(0, 2, 5, on_token=boom), row(10, 2, 5)
    scheduler.waiting.extend([bad, good])
    drain(scheduler)
    assert bad.finish_reason == "error"
    assert "listener gone" in (bad.error or "")
    assert good.token_ids == expected(good)


def test_stop_tokens_end_the_answer_and_are_not_part_of_it():
    scheduler = counting_scheduler()
    stopped = row(0, 2, 20, stops=frozenset([5]))
    scheduler.waiting.append(stopped)
    drain(scheduler)
    assert stopped.token_ids == [2, 3, 4]
    assert stopped.finish_reason == "stop"


def test_rows_stay_together_when_some_leave():
    scheduler = counting_scheduler(max_rows=4)
    rows = [row(0, 2, n) for n in (2, 9, 4, 9)]
    scheduler.waiting.extend(rows)
    drain(scheduler)
    assert all(r.token_ids == expected(r) for r in rows)
    for batch in scheduler.runner.batches:
        assert list(batch.rows) == list(range(batch.rows[0], batch.rows[0] + len(batch.rows)))
