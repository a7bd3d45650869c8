"""The admin API: uploads by id, promotion, canary, rollback, unload, removal, drain; and what it refuses."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import threading

import pytest

from lorasmith.server.keys import ANYBODY
from lorasmith.store import Store
from lorasmith.store.objects import FILE_NAMES
from tests.support.models import tiny_causal_lm
from tests.support.server import (
    BASE_ID,
    bearer,
    chat,
    events,
    make_gateway,
    make_keys,
    talk,
    write_place,
    write_strong,
)

BOSS = bearer("boss")
USER = bearer("key-user")


@pytest.fixture
def place(tmp_path):
    return write_place(tmp_path, names=("red", "green"))


def gateway_of(place, **options):
    user = dataclasses.replace(ANYBODY, name="user")
    return make_gateway(place, keys=make_keys(user, admin="boss"), **options)


async def post(client, path, **body):
    return await client.post(f"/admin/{path}", json=body, headers=BOSS)


async def upload(client, folder, files=FILE_NAMES):
    made = (await post(client, "uploads")).json()["upload"]
    for name in files:
        sent = await client.put(
            f"/admin/uploads/{made}/{name}", content=(folder / name).read_bytes(), headers=BOSS
        )
        assert sent.status_code == 200, sent.text
    return made


async def said(client, model, **settings):
    return await chat(client, model, headers=USER, **settings)


def test_an_uploaded_adapter_is_served_promoted_and_rolled_back(place):
    async def conversation(client):
        red = (await said(client, "red")).json()["lorasmith"]
        green = (await said(client, "green")).json()["lorasmith"]
        made = await upload(client, place / "adapters" / "green")
        added = await post(client, "adapters", name="red", upload=made, promote=False)
        assert added.json()["version"] == 2
        assert (await said(client, "red")).json()["lorasmith"] == red
        assert (await said(client, "red@2")).json()["lorasmith"]["adapter_digest"] == green["adapter_digest"]
        assert (await post(client, "canary", alias="red", version=2, share=1.0)).status_code == 200
        assert (await said(client, "red")).json()["lorasmith"]["adapter_version"] == 2
        await post(client, "alias", alias="red", model="red@2")
        assert (await said(client, "red")).json()["lorasmith"]["adapter_version"] == 2
        await post(client, "rollback", alias="red")
        assert (await said(client, "red")).json()["lorasmith"] == red
        audit = (await client.get("/admin/audit", headers=BOSS)).json()["entries"]
        assert [e["action"] for e in audit][:4] == ["rollback", "alias", "canary", "add"]
        again = await post(client, "adapters", name="red", upload=made)
        assert again.status_code == 404, "an upload is used once"

    talk(gateway_of(place), conversation)
    assert not list((place / "store" / "staging").iterdir())


def test_a_canary_is_split_by_user(place):
    gateway = gateway_of(place)
    gateway.store.add("red", place / "adapters" / "green", promote=False)
    gateway.store.set_canary("red", 2, 0.5)

    async def conversation(client):
        async def version(user):
            return (await said(client, "red", user=user, max_tokens=1)).json()["lorasmith"]["adapter_version"]

        return [[await version(f"u{i}") for i in range(24)] for _ in range(2)]

    first, again = talk(gateway, conversation)
    assert first == again
    assert {1, 2} == set(first)


def test_unload_is_404_at_once_while_running_requests_finish(place):
    async def conversation(client):
        running = asyncio.ensure_future(said(client, "red", max_tokens=200, stream=True))
        while not any(request.first_token_at for request in gateway.running):
            await asyncio.sleep(0.001)
        expected = gateway.store.resolve("red").digest
        assert (await post(client, "unload", model="red")).status_code == 200
        assert (await said(client, "red")).status_code == 404
        assert (await said(client, expected)).status_code == 404
        listed = (await client.get("/v1/models", headers=USER)).json()["data"]
        assert [m["id"] for m in listed] == [BASE_ID, "green"]
        chunks = events(await running)
        assert chunks[-1]["lorasmith"]["adapter_digest"] == expected
        assert chunks[-1]["choices"][0]["finish_reason"] in ("length", "stop")
        assert (await post(client, "load", model="red")).status_code == 200
        assert (await said(client, "red")).status_code == 200

    gateway = gateway_of(place)
    talk(gateway, conversation)


def test_removal_frees_the_files_once_nobody_uses_them(place):
    gateway = gateway_of(place)
    other = Store(place / "store")
    digest = other.resolve("red").digest

    async def conversation(client):
        assert (await said(client, "red")).status_code == 200
        other.remove("red")  # another process, while this server holds it
        assert other.path(digest).is_dir()
        assert (await said(client, "red")).status_code == 404
        await gateway.in_thread(gateway.adapters.sweep)  # the server does this every few seconds
        assert not other.path(digest).exists()
        assert (await post(client, "remove", model="green")).status_code == 200
        assert (await said(client, "green")).status_code == 404

    talk(gateway, conversation)


@pytest.mark.parametrize(
    "file",
    [
        "../../registry.sqlite",
        "..%2Fregistry.sqlite",
        "%2e%2e%2fx",
        "adapter.zip",
        "adapter_model.bin",
        "tokenizer.json",
        "a%00b",
    ],
)
def test_only_an_adapters_own_files_are_taken(place, file):
    before = sorted(p for p in (place / "store").rglob("*"))

    async def conversation(client):
        made = (await post(client, "uploads")).json()["upload"]
        sent = await client.put(f"/admin/uploads/{made}/{file}", content=b"x", headers=BOSS)
        foreign = await client.put(
            "/admin/uploads/..%2f..%2fobjects/adapter_config.json", content=b"x", headers=BOSS
        )
        dropped = await client.delete(f"/admin/uploads/{made}", headers=BOSS)
        return sent.status_code, foreign.status_code, dropped.status_code

    sent, foreign, dropped = talk(gateway_of(place), conversation)
    assert sent in (400, 404, 405)
    assert foreign == 404
    assert dropped == 200
    assert [p for p in sorted((place / "store").rglob("*")) if "sqlite-" not in p.name] == [
        p for p in before if "sqlite-" not in p.name
    ]


def test_a_bad_upload_is_refused_with_the_reason_and_no_path(place, tmp_path):
    narrow = write_strong(tiny_causal_lm("llama", hidden_size=16, vocab_size=258), tmp_path / "narrow", 0)

    async def conversation(client):
        fits_not = await post(client, "adapters", name="x", upload=await upload(client, narrow))
        made = await upload(client, place / "adapters" / "red", files=FILE_NAMES[1:2])
        incomplete = await post(client, "adapters", name="x", upload=made)
        made = (await post(client, "uploads")).json()["upload"]
        await client.put(
            f"/admin/uploads/{made}/adapter_model.safetensors", content=b"PK\x03\x04" * 9, headers=BOSS
        )
        await client.put(f"/admin/uploads/{made}/adapter_config.json", content=b"{}", headers=BOSS)
        damaged = await post(client, "adapters", name="x", upload=made)
        named = await post(
            client, "adapters", name="../x", upload=await upload(client, place / "adapters" / "red")
        )
        base = await post(
            client, "adapters", name=BASE_ID, upload=await upload(client, place / "adapters" / "red")
        )
        return fits_not, incomplete, damaged, named, base, await said(client, "red")

    *refused, after = talk(gateway_of(place), conversation)
    assert [r.status_code for r in refused] == [422, 422, 422, 400, 400]
    assert "wrong-shape" in refused[0].json()["error"]["message"]
    for response in refused:
        assert str(place) not in response.text
        assert "staging" not in response.text
    assert after.status_code == 200
    assert not list((place / "store" / "staging").iterdir())


def test_an_upload_that_is_too_large_is_stopped(place):
    async def conversation(client):
        made = (await post(client, "uploads")).json()["upload"]

        async def pieces():
            for _ in range(100):
                yield b"x" * 100_000

        sent = await client.put(
            f"/admin/uploads/{made}/adapter_model.safetensors", content=pieces(), headers=BOSS
        )
        return sent

    sent = talk(gateway_of(place, max_upload_bytes=1_000_000), conversation)
    assert sent.status_code == 400
    assert "larger than the 1,000,000 bytes" in sent.json()["error"]["message"]


def test_drain_refuses_new_requests_and_lets_the_old_ones_finish(place):
    gateway = gateway_of(place)

    async def conversation(client):
        running = asyncio.ensure_future(said(client, "red", max_tokens=200))
        while not gateway.queue.running_rows:
            await asyncio.sleep(0.001)
        draining = asyncio.ensure_future(post(client, "drain", timeout_s=20))
        await asyncio.sleep(0.01)
        refused = await said(client, "red")
        ready = await client.get("/ready", headers=BOSS)
        return refused, ready, await running, (await draining).json()

    refused, ready, finished, drained = talk(gateway, conversation)
    assert (refused.status_code, ready.status_code, finished.status_code) == (503, 503, 200)
    assert refused.headers["retry-after"]
    assert finished.json()["usage"]["completion_tokens"] > 0
    assert drained == {"draining": True, "running_rows": 0}


def test_what_outlives_the_drain_ends_with_an_error(place):
    gateway = gateway_of(place)

    async def conversation(client):
        whole, streamed = (
            asyncio.ensure_future(said(client, "red", max_tokens=450, stream=s, ignore_eos=True))
            for s in (False, True)
        )
        while gateway.queue.running_rows < 2:
            await asyncio.sleep(0.001)
        await post(client, "drain", timeout_s=0.01)
        return await whole, await streamed

    whole, streamed = talk(gateway, conversation)
    assert whole.status_code == 503
    assert streamed.status_code == 200
    last = streamed.text.strip().split("\n\n")[-1]
    assert '"unavailable"' in last
    assert "[DONE]" not in last


def test_metrics_name_each_adapter(place):
    gateway = gateway_of(place)

    async def conversation(client):
        for model in ("red", "red", "green", BASE_ID):
            assert (await said(client, model, stream=True)).status_code == 200
        await said(client, "made-up-name")
        return (await client.get("/metrics", headers=BOSS)).text

    text = talk(gateway, conversation)
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    red = 'adapter="red",version="1"'
    assert float(lines['lorasmith_requests_total{adapter="red",outcome="ok",version="1"}']) == 2
    assert float(lines[f"lorasmith_generated_tokens_total{{{red}}}"]) == 16
    assert float(lines[f"lorasmith_time_to_first_token_seconds_count{{{red}}}"]) == 2
    assert float(lines[f"lorasmith_time_per_output_token_seconds_count{{{red}}}"]) == 2
    hits = float(lines[f"lorasmith_slot_hits_total{{{red}}}"])
    misses = float(lines[f"lorasmith_slot_misses_total{{{red}}}"])
    assert hits + misses == 2
    assert misses >= 1
    assert float(lines["isolation_mismatch_total"]) == 0
    assert "made-up-name" not in text
    info = next(line for line in lines if line.startswith("lora_requests_info"))
    assert 'max_lora="4"' in info
    assert float(lines[info]) > 1e9


def test_lora_requests_info_names_who_runs_and_who_waits(place):
    gateway = gateway_of(place, max_rows=1)

    async def conversation(client):
        asked = [
            asyncio.ensure_future(said(client, m, max_tokens=300, ignore_eos=True))
            for m in ("red", "red", "red", "green")
        ]
        while gateway.queue.running_rows < 3 or not gateway.queue.waiting:
            await asyncio.sleep(0.001)
        text = (await client.get("/metrics", headers=BOSS)).text
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)
        return text

    text = talk(gateway, conversation)
    info = next(line for line in text.splitlines() if line.startswith("lora_requests_info{"))
    running, waiting = (
        set(re.search(rf'{k}_lora_adapters="([^"]*)"', info)[1].split(",")) for k in ("running", "waiting")
    )
    assert running | waiting == {"red", "green"}  # which of them waits is a matter of timing
    assert running - {""}
    assert waiting - {""}


def test_no_log_line_holds_a_prompt_or_an_answer(place, caplog):
    secret = "my secret question"

    async def conversation(client):
        answer = await said(client, "red", text=secret)
        await said(client, "red", text=secret, max_tokens=100_000)
        await said(client, "red", text=secret, stream=True)
        return answer.json()["choices"][0]["message"]["content"]

    caplog.set_level("DEBUG")
    answer = talk(gateway_of(place), conversation)
    from lorasmith.server.logs import JsonLines

    lines = [JsonLines().format(record) for record in caplog.records]
    requests = [line for line in lines if '"message": "request"' in line]
    assert len(requests) == 3
    assert '"digest"' in requests[0]
    assert '"tenant": "user"' in requests[0]
    assert not any(secret in line or answer in line for line in lines)


def test_readiness_follows_the_engines_heartbeat(place):
    gateway = gateway_of(place, max_silence_s=0.3)
    forward, goes_on = gateway.engine.runner.forward, threading.Event()

    def hanging(batch):
        goes_on.wait(10)
        return forward(batch)

    gateway.engine.runner.forward = hanging

    async def conversation(client):
        before = (await client.get("/ready", headers=BOSS)).status_code
        asked = asyncio.ensure_future(said(client, "red"))  # a step that does not end
        await asyncio.sleep(0.6)
        during = (await client.get("/ready", headers=BOSS)).json()
        goes_on.set()
        await asked
        await asyncio.sleep(0.2)
        return before, during, (await client.get("/ready", headers=BOSS)).status_code

    before, during, after = talk(gateway, conversation)
    assert before == after == 200
    assert during["ready"] is False
    assert "no step" in during["why_not"]


def test_a_fault_inside_the_engine_fails_one_request_without_its_reason(place):
    gateway = gateway_of(place)
    forward = gateway.engine.runner.forward
    (poison,) = gateway.base.tokenizer.encode("q")

    def faulty(batch):
        if poison in batch.tokens.flatten().tolist():
            raise RuntimeError("inner secret")
        return forward(batch)

    gateway.engine.runner.forward = faulty

    async def conversation(client):
        return await asyncio.gather(
            said(client, "red", text="q"), said(client, "green", text="?", max_tokens=1)
        )

    bad, good = talk(gateway, conversation)
    assert bad.status_code == 500
    assert "inner secret" not in bad.text
    assert bad.json()["error"]["request_id"] in bad.json()["error"]["message"]
    assert good.status_code == 200
