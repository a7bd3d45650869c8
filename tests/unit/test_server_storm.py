"""Adapters come and go, clients leave, prompts are too long: every answer that is given is the right one."""

from __future__ import annotations

import asyncio
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorasmith.bases import load_base
from lorasmith.engine import Engine, Request
from lorasmith.server.keys import Tenant
from tests.support.server import (
    BASE_ID,
    NAMES,
    bearer,
    chat,
    events,
    make_gateway,
    make_keys,
    streamed_text,
    talk,
    write_place,
)

PROMPTS = ("hello", "what is it", "one two three")
USER, BOSS = bearer("key-user"), bearer("boss")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"), names=(*NAMES, "cyan", "pink"))


def answers_alone(place, names):
    """In deterministic mode a row's bits do not depend on its company, so texts must be equal."""
    engine = Engine(
        load_base(place / BASE_ID, dtype="fp32"), max_rows=4, deterministic=True, prefix_cache_bytes=0
    )
    for name in names:
        engine.add_adapter(name, place / "adapters" / name)
    asked = [(name, p) for name in (None, *names) for p in PROMPTS]
    results = engine.generate([Request(p, adapter=n, max_tokens=8) for n, p in asked])
    engine.close()
    return {(n or BASE_ID, p): r.text for (n, p), r in zip(asked, results, strict=True)}


def storm(place, *, rounds, clients):
    names = (*NAMES, "cyan", "pink")
    alone = answers_alone(place, names)
    keys = make_keys(Tenant("user"), admin="boss")
    gateway = make_gateway(place, keys=keys, engine={"deterministic": True}, max_adapters=3, max_waiting=500)
    rng = random.Random(0)
    seen = {"right": 0, "gone": 0, "refused": 0, "left": 0}

    async def one(client, number):
        model, prompt = rng.choice((BASE_ID, *names)), rng.choice(PROMPTS)
        kind = rng.choice(("whole", "whole", "stream", "choices", "leave", "long", "bad"))
        if kind == "leave":
            task = asyncio.ensure_future(chat(client, model, prompt, max_tokens=300, headers=USER))
            await asyncio.sleep(rng.random() * 0.02)
            task.cancel()
            await asyncio.wait({task})
            seen["left"] += 1
        elif kind in ("long", "bad"):
            extra = {"max_tokens": 100_000} if kind == "long" else {"logit_bias": {"1": 5}}
            response = await chat(client, model, prompt, headers=USER, **extra)
            assert response.status_code in (400, 404)
            seen["refused"] += 1
        else:
            more = {"n": 2} if kind == "choices" else {}
            response = await chat(client, model, prompt, headers=USER, stream=kind == "stream", **more)
            if response.status_code == 404:
                seen["gone"] += 1
                return
            assert response.status_code == 200, response.text
            check(response, kind, alone[model, prompt])
            seen["right"] += 1

    def check(response, kind, expected):
        if kind == "stream":
            assert streamed_text(events(response)) == expected
        else:
            assert {c["message"]["content"] for c in response.json()["choices"]} == {expected}

    async def churn(client):
        for _ in range(rounds):
            name = rng.choice(names)
            for verb in ("unload", "load"):
                response = await client.post(f"/admin/{verb}", json={"model": name}, headers=BOSS)
                assert response.status_code == 200, response.text
                await asyncio.sleep(0)

    async def conversation(client):
        async def asking(number):
            for _ in range(rounds):
                await one(client, number)

        await asyncio.gather(churn(client), *(asking(i) for i in range(clients)))
        for _ in range(200):
            if gateway.queue.is_idle and gateway.engine.scheduler.is_idle:
                break
            await asyncio.sleep(0.01)
        leases = sum(g.leases for g in gateway.engine.registry._by_digest.values())
        return gateway.queue.running_rows, gateway.engine.scheduler.is_idle, leases

    assert talk(gateway, conversation) == (0, True, 0)
    assert gateway.mismatches == 0
    return seen


def test_a_storm_of_loads_unloads_and_leaving_clients(place):
    seen = storm(place, rounds=25, clients=8)
    assert seen["right"] > 40
    assert min(seen.values()) > 0, "the storm must have had every kind of weather"


@pytest.mark.slow
def test_a_long_storm(place):
    assert storm(place, rounds=600, clients=12)["right"] > 1000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "n",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "logprobs",
        "top_logprobs",
        "user",
        "ignore_eos",
        "tools",
        "metadata",
        "logit_bias",
    ]
)


def test_no_body_makes_the_server_fail(place):
    gateway = make_gateway(place)

    async def conversation(client):
        bodies = []

        @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.dictionaries(FIELDS, JSON, max_size=5), st.booleans())
        def collect(body, is_valid):
            bodies.append(({"model": "red", "max_tokens": 2} if is_valid else {}) | body)

        collect()
        for body in bodies:
            for path, needed in (("chat/completions", "messages"), ("completions", "prompt")):
                if "model" in body and needed not in body:
                    body = body | {"messages": [{"role": "user", "content": "x"}], "prompt": "x"}
                    body = {k: v for k, v in body.items() if k not in {"messages", "prompt"} - {needed}}
                response = await client.post(
                    f"/v1/{path}", content=json.dumps(body), headers={"content-type": "application/json"}
                )
                assert response.status_code in (200, 400, 404), (body, response.text)

    talk(gateway, conversation)
