"""The isolation proof: quiet on a sound server, loud on a broken one."""

from __future__ import annotations

import asyncio
import time

import pytest

from lorasmith.engine.prefix import Owner
from lorasmith.errors import ConfigError
from tests.support.server import NAMES, chat, make_gateway, talk, write_place

PROMPT = "the same long prompt for every adapter, long enough to fill more than one block of the prefix cache"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


def proved(place, requests, *, break_it=None):
    """Ask, wait for every comparison, and return the counters and the state of readiness."""
    gateway = make_gateway(place, reference=True, shadow_share=1.0)
    if break_it is not None:
        break_it(gateway)

    async def conversation(client):
        for wave in requests:
            answers = await asyncio.gather(*(chat(client, m, PROMPT, **settings) for m, settings in wave))
            assert all(a.status_code == 200 for a in answers)
        expected, deadline = sum(map(len, requests)), time.monotonic() + 20
        while time.monotonic() < deadline:
            text = (await client.get("/metrics")).text
            counts = {
                line.split(" ")[0].split('"')[1]: float(line.split(" ")[1])
                for line in text.splitlines()
                if line.startswith("isolation_checks_total{")
            }
            if sum(counts.values()) >= expected:
                break
            await asyncio.sleep(0.02)
        total = next(line for line in text.splitlines() if line.startswith("isolation_mismatch_total"))
        ready = await client.get("/ready")
        return counts, float(total.split(" ")[1]), ready.status_code, ready.json()["why_not"]

    return talk(gateway, conversation)


def mixed_wave(**settings):
    return [(model, settings) for model in (*NAMES, "tiny", *NAMES)]


def test_mixed_traffic_is_bit_for_bit_what_each_request_gets_alone(place):
    sampled = dict(temperature=1.5, max_tokens=12)
    streamed = dict(stream=True, max_tokens=10)
    waves = [mixed_wave(), mixed_wave(**sampled), mixed_wave(**streamed), mixed_wave(n=1, logprobs=True)]
    counts, mismatches, status, _ = proved(place, waves)
    assert counts == {"match": 28.0}
    assert mismatches == 0
    assert status == 200


def test_a_prefix_cache_that_forgets_the_adapter_is_found_out(place, monkeypatch):
    def break_it(gateway):
        sound = Owner.seed
        monkeypatch.setattr(Owner, "seed", lambda owner: sound(Owner(owner.base, None, owner.tenant)))

    counts, mismatches, status, why = proved(
        place, [[("red", {})], [("green", {})], [("blue", {})]], break_it=break_it
    )
    assert counts["match"] == 1
    assert counts["mismatch"] == mismatches == 2
    assert status == 503
    assert "2 answers differ when computed alone" in why


def test_weights_that_changed_in_memory_are_found_out(place):
    def break_it(gateway):
        digest = gateway.store.resolve("red").digest
        gateway.adapters.load(digest, None)
        adapter = gateway.engine.registry._by_digest[digest].adapter
        next(iter(adapter.factors.values())).B.mul_(-1)

    counts, mismatches, status, _ = proved(place, [[("green", {}), ("red", {})]], break_it=break_it)
    assert counts == {"match": 1.0, "mismatch": 1.0}
    assert (mismatches, status) == (1, 503)


def test_a_swapped_slot_is_found_out(place):
    """What vLLM was reported for: a running request that is served with another one's adapter."""

    def break_it(gateway):
        slots = gateway.engine.runner.slots
        sound = slots.hold

        def hold(owners):
            sound(owners)
            held = [i for i, g in enumerate(slots._held) if g is not None and g.digest]
            if len(held) >= 2:
                for stack in slots.stacks:
                    for tensor in (stack.A, *stack.B):
                        tensor[held[0]], tensor[held[1]] = tensor[held[1]].clone(), tensor[held[0]].clone()
                slots.hold = sound

        slots.hold = hold

    _, mismatches, status, _ = proved(place, [mixed_wave()], break_it=break_it)
    assert mismatches >= 1
    assert status == 503


def test_an_answer_under_another_digest_never_leaves(place):
    gateway = make_gateway(place)
    original = gateway.engine._row

    def row(request, on_token):
        made = original(request, on_token)
        made.generation = gateway.engine.registry.lease(gateway.store.resolve("green").digest)
        return made

    async def conversation(client):
        assert (await chat(client, "green")).status_code == 200
        gateway.engine._row = row
        return await chat(client, "red"), await client.get("/ready")

    answer, ready = talk(gateway, conversation)
    assert answer.status_code == 500
    assert "choices" not in answer.json()
    assert ready.status_code == 503


def test_the_proof_needs_deterministic_engines(place):
    with pytest.raises(ConfigError, match="deterministic"):
        make_gateway(place, shadow_share=0.5)


def test_a_share_of_the_requests_is_checked(place):
    gateway = make_gateway(place, reference=True, shadow_share=0.25)
    assert 0.2 < sum(gateway.shadow.picks() for _ in range(4000)) / 4000 < 0.3
    gateway._close()
