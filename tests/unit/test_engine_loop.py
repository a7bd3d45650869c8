"""The loop: threads, stopping, and what a fault may touch."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from lorasmith.engine import Engine, Request, attached
from lorasmith.errors import MergeStateError
from lorasmith.inject import lora_layers
from tests.support.engines import (
    engine_of,
    greedy,
    make_adapter,
    mixed_adapters,
    some_requests,
    tiny_base,
    with_biases,
)
from tests.support.models import tokens
from tests.support.tokenizer import ByteTokenizer


def test_the_loop_serves_many_threads_and_stops():
    base = tiny_base(dtype=torch.float64)
    adapters = mixed_adapters(base.model)
    engine = engine_of(base, adapters, max_rows=3)
    requests = some_requests(adapters, count=24, seed=5)
    expected = [r.token_ids for r in engine.generate(requests)]
    engine.run_forever()
    assert engine.is_alive()
    found: dict[int, tuple[int, ...]] = {}

    def client(numbers: range) -> None:
        for i in numbers:
            found[i] = engine.submit(requests[i]).result(30).token_ids

    threads = [threading.Thread(target=client, args=(range(k, 24, 4),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(24)] == expected
    assert [r.token_ids for r in engine.generate(requests)] == expected
    engine.stop()
    assert not engine.is_alive()


def test_stopping_cancels_what_is_left_so_nobody_waits_for_ever():
    engine = Engine(tiny_base(), max_rows=1)
    engine.run_forever()
    handles = [engine.submit(Request([1], max_tokens=100)) for _ in range(4)]
    engine.stop()
    assert all(handle.result(5).finish_reason in ("cancelled", "length") for handle in handles)


def test_the_loop_lives_on_after_faults_inside_and_outside_a_step():
    engine = Engine(tiny_base())
    real, calls = engine.scheduler.step, []

    def broken():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("scheduler bug")
        return real()

    engine.scheduler.step = broken
    engine.run_forever()
    assert engine.submit(Request([1], max_tokens=2)).result(10).finish_reason == "length"
    engine.merged.before_step = lambda scheduler, owners: 1 / 0
    failed = engine.submit(Request([1], max_tokens=2)).result(10)
    assert (failed.finish_reason, "ZeroDivisionError" in (failed.error or "")) == ("error", True)
    engine.merged.before_step = lambda scheduler, owners: None
    assert engine.submit(Request([1], max_tokens=2)).result(10).finish_reason == "length"
    engine.stop()


# The watchdog ------------------------------------------------------------------------------------


def wait_until(condition, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def test_a_dead_loop_is_replaced_and_what_was_in_flight_fails_clearly():
    def die(event) -> None:
        raise SystemExit

    base = tiny_base(dtype=torch.float64)
    engine = Engine(base, max_rows=2)
    waiting = Request([4, 5], max_tokens=6)
    handles = [engine.submit(Request([1, 2], max_tokens=60), on_token=die)]
    handles += [engine.submit(r) for r in (Request([3], max_tokens=60), waiting)]
    engine.run_forever()
    for handle in handles[:2]:
        result = handle.result(20)
        assert result.finish_reason == "error"
        assert "loop died" in (result.error or "")
    assert handles[2].result(20).token_ids == greedy(base.model, waiting)
    wait_until(lambda: engine.restarts == 1)
    assert engine.is_alive()
    engine.stop()


def test_a_step_that_hangs_is_given_up_and_its_thread_touches_nothing_afterwards():
    base = tiny_base(dtype=torch.float64)
    adapters = mixed_adapters(base.model)
    gate, events = threading.Event(), []

    def block(event) -> None:
        events.append(event)
        if event.finish_reason is None:
            gate.wait(30)

    engine = engine_of(base, adapters, max_rows=2, stuck_after_s=0.4)
    later = some_requests(adapters, count=6, seed=3)
    expected = [r.token_ids for r in engine_of(base, adapters, max_rows=2).generate(later)]
    blocked = engine.submit(Request([1, 2], adapter="small", max_tokens=60), on_token=block)
    beside = engine.submit(Request([3], adapter="large", max_tokens=60))
    handles = [engine.submit(r) for r in later]
    engine.run_forever()
    for handle in (blocked, beside):
        result = handle.result(20)
        assert result.finish_reason == "error"
        assert "longer than 0.4 s" in (result.error or "")
    assert [h.result(20).token_ids for h in handles] == expected
    handles = [engine.submit(r) for r in later]
    gate.set()  # the old thread wakes while the new one serves
    assert [h.result(20).token_ids for h in handles] == expected
    wait_until(lambda: sum(t.name == "lorasmith-engine" for t in threading.enumerate()) == 1)
    assert [engine.submit(r).result(20).token_ids for r in later] == expected
    wait_until(lambda: events[-1].finish_reason == "error")
    assert engine.restarts == 1
    assert all(lease.leases == 0 for lease in engine.registry._by_digest.values())
    engine.stop()


def test_an_engine_that_hangs_while_it_changes_weights_serves_nobody_any_more(monkeypatch):
    base = tiny_base("qwen2", dtype=torch.float64)
    engine = engine_of(base, {"biased": with_biases(base.model, 1)}, stuck_after_s=0.3)
    gate = threading.Event()
    monkeypatch.setattr(attached, "inject", lambda model, adapter: gate.wait(30))
    engine.run_forever()
    result = engine.submit(Request([1], adapter="biased", max_tokens=9)).result(20)
    assert result.finish_reason == "error"
    wait_until(lambda: engine.failure is not None)
    assert not engine.is_alive()
    with pytest.raises(MergeStateError, match="load the base again"):
        engine.submit(Request([1], max_tokens=9))
    gate.set()
    engine.stop()


def test_stopping_in_the_middle_of_a_step_that_hangs_ends_every_request():
    gate, inside = threading.Event(), threading.Event()

    def block(event) -> None:
        inside.set()
        gate.wait(30)

    engine = Engine(tiny_base(), max_rows=1)
    handles = [
        engine.submit(Request([1], max_tokens=9), on_token=block),
        engine.submit(Request([1], max_tokens=9)),
    ]
    engine.run_forever()
    assert inside.wait(20)
    engine.stop(timeout_s=0.2)
    assert [h.result(5).finish_reason for h in handles] == ["error", "cancelled"]
    gate.set()


# Faults stay local -------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_never_reach_a_neighbour_or_a_successor():
    base = tiny_base(dtype=torch.float32)
    bad = make_adapter(base.model, 1, rank=2)
    for factors in bad.factors.values():
        factors.B.fill_(1e30)
    engine = engine_of(base, {"bad": bad}, max_rows=2, chunk_tokens=8, prefix_cache_bytes=0)
    long, short = Request(tokens(1, 20)[0].tolist(), max_tokens=30), Request([7], max_tokens=9)
    poisoned = Request(tokens(1, 18, seed=2)[0].tolist(), adapter="bad", max_tokens=5)
    expected = [engine.generate([r])[0].token_ids for r in (long, short)]
    for cut in (False, True):
        handles = [engine.submit(r) for r in (poisoned, long)]
        if cut:  # it leaves in the middle of its prompt, before anybody looked at a logit
            engine.step()
            handles[0].cancel()
        handles.append(engine.submit(short))
        while engine.step():
            pass
        assert handles[0].result(0).finish_reason == ("cancelled" if cut else "error")
        assert [h.result(0).token_ids for h in handles[1:]] == expected


def test_an_adapter_that_cannot_be_placed_fails_its_own_requests():
    base = tiny_base(dtype=torch.float64)
    adapters = mixed_adapters(base.model)
    engine = engine_of(base, adapters, max_rows=4)
    real, digest = engine.runner.slots._place, engine.adapters["large"]

    def place(owner, slot) -> None:
        if owner.digest == digest:
            raise MemoryError("no room")
        real(owner, slot)

    engine.runner.slots._place = place
    requests = [Request([5, 6], adapter=name, max_tokens=4) for name in ("small", "large", None, "partial")]
    results = engine.generate(requests)
    assert [r.finish_reason for r in results] == ["length", "error", "length", "length"]
    assert "no room" in (results[1].error or "")
    expected = [engine.generate([r])[0].token_ids for r in requests]
    assert [r.token_ids for i, r in enumerate(results) if i != 1] == [
        e for i, e in enumerate(expected) if i != 1
    ]


def test_a_tokenizer_that_raises_ends_its_own_request():
    class Picky(ByteTokenizer):
        def decode(self, ids):
            if 66 in ids:
                raise ValueError("cannot decode")
            return super().decode(ids)

    base = tiny_base(tokenizer=Picky(chat=False), vocab_size=260, dtype=torch.float64)
    engine = Engine(base, max_rows=3)
    real = engine.runner.forward

    def forward(batch):  # rows whose prompt ends in 66 go on writing 66, the others 70
        logits = real(batch)
        for line, length in enumerate(batch.lengths):
            logits[line, 66 if int(batch.tokens[line, length - 1]) == 66 else 70] = 1e3
        return logits

    engine.runner.forward = forward
    requests = [
        Request([70], max_tokens=3),
        Request([66], max_tokens=3),
        Request([66], max_tokens=3, stop="z"),
    ]
    results = engine.generate(requests)
    assert [r.finish_reason for r in results] == ["length", "error", "error"]
    assert results[0].text == "FFF"
    assert all("cannot decode" in (r.error or "") for r in results[1:])


def test_listeners_hear_of_every_end():
    engine = Engine(tiny_base(), max_rows=1)
    heard: dict[str, list] = {"running": [], "waiting": []}
    running = engine.submit(Request([1], max_tokens=90), on_token=heard["running"].append)
    waiting = engine.submit(Request([1], max_tokens=90), on_token=heard["waiting"].append)
    engine.step()
    running.cancel()
    waiting.cancel()
    engine.step()
    for events in heard.values():
        assert [e.finish_reason for e in events if e.finish_reason] == ["cancelled"]
        assert events[-1].finish_reason == "cancelled"


def test_an_idle_base_carries_nothing():
    base = tiny_base("qwen2", dtype=torch.float64)
    engine = engine_of(base, {"biased": with_biases(base.model, 1)})
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    handle = engine.submit(Request([1, 2], adapter="biased", max_tokens=9))
    engine.step()
    assert lora_layers(base.model)
    handle.cancel()
    engine.step()
    assert not lora_layers(base.model)
    assert all(torch.equal(before[name], p) for name, p in base.model.named_parameters())
