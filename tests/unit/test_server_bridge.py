"""The seam between the engine's thread and the event loop."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from lorasmith.engine import Handle, Result, TokenEvent
from lorasmith.errors import DeadlineError
from lorasmith.server.bridge import Answers, Bridge

RESULT = Result((1, 2), "ab", None, "stop")


def test_everything_posted_arrives_once_and_in_order():
    async def run():
        loop = asyncio.get_running_loop()
        bridge, got, done = Bridge(loop), [], asyncio.Event()

        def produce(who):
            for i in range(2000):
                bridge.post(got.append, (who, i))

        threads = [threading.Thread(target=produce, args=(who,)) for who in range(3)]
        for t in threads:
            t.start()
        await asyncio.to_thread(lambda: [t.join() for t in threads])
        bridge.post(lambda _: done.set(), None)
        await asyncio.wait_for(done.wait(), 5)
        return got

    got = asyncio.run(run())
    assert len(got) == 6000
    assert all([i for who, i in got if who == w] == list(range(2000)) for w in range(3))


def test_one_wake_up_carries_a_whole_step():
    async def run():
        loop = asyncio.get_running_loop()
        bridge, wakes = Bridge(loop), []
        original = bridge._run
        bridge._run = lambda: (wakes.append(1), original())[1]
        got = []
        for i in range(16):
            bridge.post(got.append, i)
        await asyncio.sleep(0.01)
        return len(wakes), got

    assert asyncio.run(run()) == (1, list(range(16)))


def test_tokens_come_before_the_result_and_the_stream_ends_with_the_last_result():
    async def run():
        answers = Answers(Bridge(asyncio.get_running_loop()))
        first, second = Handle(lambda: None), Handle(lambda: None)
        answers.follow(first)
        answers.follow(second)

        def engine():
            for i in range(3):
                answers.listener(0)(TokenEvent(i, str(i)))
            second.set(RESULT)
            time.sleep(0.01)
            first.set(RESULT)

        threading.Thread(target=engine).start()
        return [event async for event in answers.events(5)]

    events = asyncio.run(run())
    assert [i for i, _ in events] == [0, 0, 0, 1, 0]
    assert [e for _, e in events[3:]] == [RESULT, RESULT]


def test_a_result_that_was_there_first_is_not_lost():
    async def run():
        answers = Answers(Bridge(asyncio.get_running_loop()))
        handle = Handle(lambda: None)
        handle.set(RESULT)
        answers.follow(handle)
        return [event async for event in answers.events(5)]

    assert asyncio.run(run()) == [(0, RESULT)]


def test_a_request_handed_over_after_its_client_left_is_cancelled():
    async def run():
        answers = Answers(Bridge(asyncio.get_running_loop()))
        answers.cancel()
        handle = Handle(lambda: None)
        answers.follow(handle)
        return handle.is_cancelled

    assert asyncio.run(run())


def test_time_runs_out():
    async def run():
        answers = Answers(Bridge(asyncio.get_running_loop()))
        answers.follow(Handle(lambda: None))
        return [event async for event in answers.events(0.02)]

    with pytest.raises(DeadlineError):
        asyncio.run(run())


def test_a_listener_that_raises_does_not_reach_the_engine():
    handle = Handle(lambda: None)

    def broken(_):
        raise RuntimeError

    handle.when_done(broken)
    handle.set(RESULT)
    assert handle.result() == RESULT
