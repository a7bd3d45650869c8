"""What an ingress decides for all replicas, with replicas that the test can break."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import replace

import httpx
import pytest

from lorasmith.server.config import ServerConfig
from lorasmith.server.fleet import Ingress, WorkerSpec, create_fleet_app, ingress, workers
from lorasmith.server.fleet.meter import Meter
from lorasmith.server.fleet.pool import DIGEST, Call, ReplicaLostError, Reply
from lorasmith.server.fleet.rendezvous import ranked
from lorasmith.server.fleet.speak import speak
from lorasmith.server.fleet.workers import Workers
from lorasmith.server.keys import Keys, Tenant
from lorasmith.server.names import Resolved
from lorasmith.store import Store
from tests.support.server import bearer, chat, events, make_keys, write_place

A = bearer("key-a")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Replicas that the test writes need no time to come back."""
    monkeypatch.setattr(ingress, "BETWEEN_TRIES_S", 0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"), names=("red", "green"))


class Replicas:
    """A pool of answers that the test writes: one callable after the other."""

    on_change = staticmethod(lambda: None)
    rows = 4

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.calls = []

    def why_not_ready(self):
        return None

    async def start(self):
        self.on_change()

    async def ask(self, call, avoid):
        self.calls.append((call, tuple(avoid)))
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        return await script(call)

    async def metrics(self):
        return {}

    def status(self):
        return []

    async def close(self, timeout_s):
        pass


def answer(*pieces, status=200, digest=None, die=False, replica="0"):
    async def script(call):
        async def chunks():
            for piece in pieces:
                yield piece
            if die:
                raise ReplicaLostError(replica, "killed")

        async def close():
            pass

        headers = {DIGEST: digest or call.resolved.digest or "none", "content-type": "application/json"}
        return Reply(replica, status, headers, chunks(), close)

    return script


def usage(total):
    return json.dumps({"usage": {"total_tokens": total}}).encode()


def event(**values):
    return b"data: " + json.dumps(values).encode() + b"\n\n"


async def lost(call):
    raise ReplicaLostError("0", "gone")


def talk(place, pool, conversation, keys=None, **config):
    async def run():
        ingress = Ingress(
            pool, Store(place / "store"), ServerConfig("tiny", **config), keys=keys or Keys(),
            tokenizer=None, facts=None,
        )  # fmt: skip
        await ingress.start()
        transport = httpx.ASGITransport(create_fleet_app(ingress))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await conversation(client, ingress)

    return asyncio.run(run())


def test_only_the_adapters_of_a_replica_that_goes_move():
    replicas = [f"{i}" for i in range(5)]
    digests = [f"{i:064x}" for i in range(2000)]
    before = {d: ranked(d, replicas) for d in digests}
    counts = [sum(order[0] == r for order in before.values()) for r in replicas]
    assert all(300 < n < 500 for n in counts), "binomial(2000, 1/5): 400 ± 18"
    for digest, order in before.items():
        assert ranked(digest, reversed(replicas[:-1])) == [r for r in order if r != "4"]


def test_a_lost_replica_is_nobodys_trouble(place):
    pool = Replicas(lost, answer(b"", die=True), answer(status=503), answer(usage(3), replica="1"))

    async def go(client, ingress):
        found = await chat(client, "red")
        return found, ingress

    found, ingress = talk(place, pool, go)
    assert found.status_code == 200
    assert [avoid for _, avoid in pool.calls] == [(), ("0",), ("0", "0"), ("0", "0", "0")]
    assert len({call.body for call, _ in pool.calls}) == 1
    assert ingress.queue.is_idle


def test_it_gives_up_in_the_end(place):
    found = talk(place, Replicas(lost), lambda client, _: chat(client, "red"))
    assert found.status_code == 503
    assert found.json()["error"]["code"] == "unavailable"


def test_an_answer_of_another_adapter_reaches_nobody(place):
    pool = Replicas(answer(b'{"secret": 1}', digest="f" * 64))

    async def go(client, ingress):
        whole, stream = await chat(client, "red"), await chat(client, "red", stream=True)
        return whole, stream, ingress.metrics.wrong._value.get()

    whole, stream, wrong = talk(place, pool, go)
    assert (whole.status_code, stream.status_code, wrong) == (500, 500, 2)
    assert "secret" not in whole.text + stream.text


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_events_pass_untouched_however_the_pieces_are_cut(cut):
    trap = event(choices=[{"text": '"choices": [] and "usage"'}])
    said = event(choices=[{"text": "hé"}]) + trap
    counted = event(choices=[], usage={"total_tokens": 7})
    raw = said + counted + DONE
    for wants, expected in ((False, said + b"data: [DONE]\n\n"), (True, raw)):
        meter = Meter(wants_usage=wants)
        assert meter.ending is None
        assert b"".join(meter.feed(raw[i : i + cut]) for i in range(0, len(raw), cut)) == expected
        assert (meter.used_tokens, meter.ending) == (7, "ok")


ROLE = event(choices=[{"delta": {"role": "assistant", "content": ""}, "index": 0}])
WORD = event(choices=[{"delta": {"content": "x"}, "index": 0}])
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("begun", [b"", ROLE, ROLE + WORD[:20]])
def test_a_stream_without_a_word_yet_is_asked_again(place, begun):
    """Half an event of the lost replica must not stick to what the next one says."""
    pool = Replicas(answer(begun, die=True), answer(ROLE, WORD + DONE, replica="1"))
    found = talk(place, pool, lambda client, _: chat(client, "red", stream=True))
    assert found.content == ROLE + WORD + DONE


@pytest.mark.parametrize("die", [True, False])
def test_a_stream_that_breaks_off_ends_with_an_error(place, die):
    pool = Replicas(answer(ROLE + WORD, die=die))
    found = talk(place, pool, lambda client, _: chat(client, "red", stream=True))
    assert found.status_code == 200
    assert "[DONE]" not in found.text
    assert json.loads(found.text.rstrip().rsplit("data: ", 1)[1])["error"]["code"] == "unavailable"
    assert len(pool.calls) == 1, "tokens are with the client: nobody else may be asked"


def test_token_quotas_are_charged_with_what_was_used(place):
    """300 tokens a minute: each request may use 108 at most, but uses 10."""
    keys = make_keys(Tenant("a", tokens_per_minute=300))
    done = event(choices=[], usage={"total_tokens": 10}) + DONE
    prompt = {"model": "red", "prompt": [1] * 8, "max_tokens": 100, "temperature": 0}

    async def go(client, ingress):
        codes = []
        for index in range(19):
            body = prompt | {"stream": bool(index % 2)}
            ingress.pool.scripts = [answer(done) if index % 2 else answer(usage(10))]
            codes.append((await client.post("/v1/completions", json=body, headers=A)).status_code)
        bucket = ingress.quotas._buckets["a", "tokens"]
        bucket._clock = lambda: bucket._at  # stands still
        level = bucket._level
        ingress.pool.scripts = [answer(usage(108))]
        await client.post("/v1/completions", json=prompt, headers=A)
        return codes, level, bucket._level, ingress.pool.calls[-1][0]

    codes, before, after, call = talk(place, Replicas(answer()), go, keys=keys)
    assert codes == [200] * 19, "19 × 108 would be far too much"
    assert before - after == pytest.approx(108)
    assert call.tokens == 108
    assert json.loads(call.headers()["x-lorasmith-asked"])["tenant"]["tokens_per_minute"] is None


def test_a_canary_gets_its_share_once(tmp_path):
    """The replicas are asked for a digest, so nothing is drawn twice."""
    place = write_place(tmp_path, names=("red", "green"))
    store = Store(place / "store")
    store.add("red", place / "adapters" / "green")
    store.set_alias("live", "red@1")
    store.set_canary("live", 2, 0.25)
    one, two = (v.digest for v in store.versions("red"))
    pool = Replicas(answer(usage(1)))

    async def go(client, _):
        for index in range(200):
            assert (await chat(client, "live", user=f"u{index % 100}")).status_code == 200

    talk(place, pool, go)
    asked = [json.loads(call.body)["model"] for call, _ in pool.calls]
    assert set(asked) == {one, two}
    assert asked[:100] == asked[100:], "the same user gets the same side"
    assert 10 <= asked[:100].count(two) <= 40, "binomial(100, 1/4): 25 ± 4.3"
    assert all(call.resolved.digest == json.loads(call.body)["model"] for call, _ in pool.calls)


def test_who_waits_is_limited_for_all_replicas_together(place):
    keys = make_keys(replace(Tenant("a"), max_waiting=2))

    async def go(client, ingress):
        gate = asyncio.Event()

        async def slow(call):
            await gate.wait()
            return await answer(usage(1))(call)

        ingress.pool.scripts = [slow]
        asked = [asyncio.ensure_future(chat(client, "red", headers=A)) for _ in range(7)]
        while ingress.queue.waiting < 2 or not any(task.done() for task in asked):
            await asyncio.sleep(0.01)
        gate.set()
        return sorted(r.status_code for r in await asyncio.gather(*asked))

    assert talk(place, Replicas(answer()), go, keys=keys) == [200] * 6 + [429]


def test_streams_pass_the_usage_on_to_who_asked(place):
    done = ROLE + WORD + event(choices=[], usage={"total_tokens": 10}) + DONE
    pool = Replicas(answer(done))

    async def go(client, _):
        asked = await chat(client, "red", stream=True, stream_options={"include_usage": True})
        return events(asked), events(await chat(client, "red", stream=True))

    asked, not_asked = talk(place, pool, go)
    assert [len(asked), len(not_asked)] == [3, 2]
    assert all(json.loads(call.body)["stream_options"]["include_usage"] for call, _ in pool.calls)


class Sleepers(Workers):
    """Workers that only sleep, and answer as the test says."""

    def __init__(self, count=2):
        self.why_not_of = {}
        super().__init__(WorkerSpec("", "", "", ServerConfig("tiny")), count, rows=2, lookahead=0, threads=1)

    def _command(self):
        return [sys.executable, "-c", "import sys; sys.stdin.read()"]

    async def _probe(self, worker):
        return self.why_not_of.get(worker.process.pid)


def watch(conversation):
    async def run():
        pool = Sleepers()
        pool.changes = []
        pool.on_change = lambda: pool.changes.append(pool.rows)
        await pool.start()
        try:
            return await conversation(pool)
        finally:
            await pool.close(1.0)

    return asyncio.run(run())


async def until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def a_call(rows=1):
    resolved = Resolved("red", "red", 1, "a" * 64)
    return Call("/v1/completions", b"{}", Tenant("a"), resolved, "id", rows, 1, False, False)


def test_a_stuck_worker_is_ended_and_one_that_drains_is_not(monkeypatch):
    """Requests that it holds would else wait until their time is over."""
    monkeypatch.setattr(workers, "UNREADY_S", 0.2)

    async def go(pool):
        stuck, draining = (w.process.pid for w in pool.workers)
        pool.why_not_of.update({stuck: "ReadTimeout: ", draining: "draining"})
        await until(lambda: pool.workers[0].process.pid != stuck and pool.workers[0].is_ready)
        return draining, [w.process.pid for w in pool.workers], pool.workers[0].restarts, pool.changes

    draining, pids, restarts, changes = watch(go)
    assert (pids[1], restarts) == (draining, 1)
    assert changes == [2, 4, 2, 0, 2], "rows that may be on their way, at each change"


def test_a_replica_that_was_lost_is_asked_again_only_if_there_is_no_other():
    async def go(pool):
        call = a_call()
        home = (await pool._choose(call, ())).name
        other = {"0": "1", "1": "0"}[home]
        for worker in pool.workers:
            worker.rows = 2 * (worker.name == other)
        chosen = [(await pool._choose(call, avoid)).name for avoid in ((), (home,), (home, other))]
        for worker in pool.workers:
            worker.rows = 0
        return home, other, chosen

    home, other, chosen = watch(go)
    assert chosen == [home, other, home], "even where the other one has no room"


def test_a_worker_that_cannot_be_started_is_tried_again(monkeypatch):
    async def go(pool):
        whole, refusals = pool._new, [OSError(12, "Cannot allocate memory")] * 2

        def new(name):
            if refusals:
                raise refusals.pop()
            return whole(name)

        monkeypatch.setattr(pool, "_new", new)
        lost = pool.workers[0].process.pid
        os.kill(lost, 9)
        await until(lambda: pool.workers[0].process.pid != lost and pool.workers[0].is_ready)
        return refusals

    assert watch(go) == []


def test_an_application_is_asked_without_a_socket_and_hears_when_nobody_listens():
    heard = []

    async def app(scope, receive, send):
        heard.append((scope["path"], await receive()))
        await send({"type": "http.response.start", "status": 201, "headers": [(b"X-A", b"b")]})
        if scope["path"] == "/dies":
            raise ReplicaLostError("0", "in the middle")
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        if scope["path"] == "/long":
            heard.append(await receive())
            return
        await send({"type": "http.response.body", "body": b"two"})

    async def go():
        whole = [piece async for piece in speak(app, "/short", b"{}", {"a": "b"})]
        with pytest.raises(ReplicaLostError):
            async for _ in speak(app, "/dies", b"", {}):
                pass
        pieces = speak(app, "/long", b"", {})
        begun = [await anext(pieces), await anext(pieces)]
        await pieces.aclose()
        await until(lambda: heard[-1] == {"type": "http.disconnect"})
        return whole, begun

    whole, begun = asyncio.run(go())
    assert whole == [(201, {"x-a": "b"}), b"one", b"two"]
    assert begun == whole[:2]
    assert heard[0] == ("/short", {"type": "http.request", "body": b"{}", "more_body": False})
