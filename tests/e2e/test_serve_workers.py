"""`lorasmith serve --workers 2`: real processes behind one address, one of which is killed again and again."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time

import httpx
import pytest

from lorasmith.server import hash_key
from tests.support.served import Served
from tests.support.server import BASE_ID, NAMES, bearer, chat_body, events, streamed_text, write_place
from tests.support.storm import load_storm

BOSS = bearer("boss")
A, B = bearer("key-a"), bearer("key-b")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("place"), context=16_384)
    keys = place / "keys.toml"
    keys.write_text(
        f'[admin]\nkeys = ["{hash_key("boss")}"]\n[tenants.a]\nkeys = ["{hash_key("key-a")}"]\n'
        f'[tenants.b]\nkeys = ["{hash_key("key-b")}"]\nadapters = ["red"]\nrequests_per_minute = 6\n'
        "tokens_per_minute = 4000\n"
    )
    server = Served(place, "--workers", 2, "--keys", keys, "--drain-s", 20)
    yield server
    assert server.stop() == 0, "".join(server.lines)


def workers(served):
    return httpx.get(f"{served.url}/admin/status", headers=BOSS).json()["workers"]


def until_all_are_ready(served, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not all(w["ready"] for w in workers(served)):
        assert time.monotonic() < deadline, workers(served)
        time.sleep(0.05)


def metric(served, start):
    text = httpx.get(f"{served.url}/metrics", headers=BOSS).text
    return [line for line in text.splitlines() if line.startswith(start)]


def ask(client, served, model, text="hello", **settings):
    body = chat_body(model, text, **settings)
    return client.post(f"{served.url}/v1/chat/completions", json=body, headers=A)


def content(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_an_adapter_has_a_home_and_every_answer_is_its_own(served):
    until_all_are_ready(served)
    with httpx.Client(timeout=60) as client:
        alone = {model: content(ask(client, served, model)) for model in (BASE_ID, *NAMES)}
        assert len(set(alone.values())) == 4
        for model, text in alone.items():
            whole = ask(client, served, model)
            chunks = events(ask(client, served, model, stream=True))
            assert streamed_text(chunks) == content(whole) == text
            assert not any(chunk.get("usage") for chunk in chunks)
            asked = ask(client, served, model, stream=True, stream_options={"include_usage": True})
            assert events(asked)[-1]["usage"] == whole.json()["usage"]
            assert whole.headers["x-lorasmith-adapter-digest"] == (
                whole.json()["lorasmith"]["adapter_digest"] or "none"
            )
    served_by = {}
    for line in metric(served, 'lorasmith_requests_total{adapter="'):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        served_by.setdefault(labels["adapter"], set()).add(labels["worker"])
    assert set(served_by) == {BASE_ID, *NAMES}
    assert all(len(homes) == 1 for homes in served_by.values()), "one request at a time never leaves its home"


def test_a_hot_adapter_runs_on_both_and_the_gateway_metric_names_it(served):
    until_all_are_ready(served)
    body = chat_body("red", max_tokens=3000, ignore_eos=True)

    async def run():
        async with httpx.AsyncClient(timeout=120) as client:
            address = f"{served.url}/v1/chat/completions"
            asked = [asyncio.ensure_future(client.post(address, json=body, headers=A)) for _ in range(10)]
            found = set()
            while not all(task.done() for task in asked) and len(found) < 2:
                status = await client.get(f"{served.url}/admin/status", headers=BOSS)
                found = {w["worker"] for w in status.json()["workers"] if w["rows"]}
            text = (await client.get(f"{served.url}/metrics", headers=BOSS)).text
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            return found, text

    found, text = asyncio.run(run())
    assert found == {"0", "1"}
    whole = next(line for line in text.splitlines() if line.startswith("lora_requests_info{"))
    assert 'running_lora_adapters="red"' in whole
    assert "worker=" not in whole
    each = [line for line in text.splitlines() if line.startswith("lorasmith_worker_lora_requests_info{")]
    assert {re.search(r'worker="(\d)"', line)[1] for line in each} == {"0", "1"}


def test_requests_survive_a_killed_worker_and_a_broken_stream_says_so(served):
    until_all_are_ready(served)
    before = {w["worker"]: w["restarts"] for w in workers(served)}

    async def run():
        async with httpx.AsyncClient(timeout=120) as client:
            address = f"{served.url}/v1/chat/completions"

            async def whole(model, index):
                body = chat_body(model, f"hello {index % 5}", max_tokens=24, ignore_eos=True)
                answer = await client.post(address, json=body, headers=A)
                return model, index % 5, content(answer)

            alone = {(m, i): (await whole(m, i))[2] for m in (BASE_ID, *NAMES) for i in range(5)}
            body = chat_body("green", max_tokens=15_000, ignore_eos=True, stream=True)
            async with client.stream("POST", address, json=body, headers=A) as stream:
                pieces = stream.aiter_text()
                began = await anext(pieces)
                status = (await client.get(f"{served.url}/admin/status", headers=BOSS)).json()
                busy = next(w for w in status["workers"] if w["rows"])
                asked = [asyncio.ensure_future(whole((BASE_ID, *NAMES)[i % 4], i)) for i in range(40)]
                await asyncio.sleep(0.1)
                os.kill(busy["pid"], signal.SIGKILL)
                text = began + "".join([piece async for piece in pieces])
            return alone, await asyncio.gather(*asked), text, busy["worker"]

    alone, answers, text, killed = asyncio.run(run())
    assert len(answers) == 40
    assert all(alone[model, index] == answer for model, index, answer in answers)
    last = json.loads(text.rstrip().rsplit("data: ", 1)[1])
    assert last["error"]["code"] == "unavailable", "the client is told, and sees no end mark"
    assert metric(served, "lorasmith_fleet_broken_streams_total ")[0].endswith(" 1.0")
    until_all_are_ready(served)
    assert {w["worker"]: w["restarts"] - before[w["worker"]] for w in workers(served)}[killed] == 1


def test_keys_quotas_and_aliases_are_decided_once_for_all(served):
    until_all_are_ready(served)
    with httpx.Client(timeout=60) as client:
        address = f"{served.url}/v1/chat/completions"
        assert client.post(address, json=chat_body("red")).status_code == 401
        models = client.get(f"{served.url}/v1/models", headers=B).json()["data"]
        assert [m["id"] for m in models] == ["red"]
        assert client.post(address, json=chat_body("blue"), headers=B).status_code == 404
        forged = B | {"x-lorasmith-asked": '{"tenant": {"name": "a"}, "resolved": {}}'}
        codes = [client.post(address, json=chat_body("red"), headers=forged) for _ in range(8)]
        assert [c.status_code for c in codes] == [200] * 6 + [429] * 2
        assert int(codes[-1].headers["retry-after"]) >= 1
        assert client.post(address, json=chat_body("red", nonsense=1), headers=A).status_code == 400
        assert client.post(address, content=b"{", headers=A).status_code == 415
        too_long = chat_body("red", max_tokens=20_000)
        assert (
            client.post(address, json=too_long, headers=A).json()["error"]["code"]
            == "context_length_exceeded"
        )

        alias = {"alias": "mine", "model": "green"}
        assert client.post(f"{served.url}/admin/alias", json=alias, headers=BOSS).status_code == 200
        named = ask(client, served, "mine")
        assert named.headers["x-lorasmith-model"] == "green@1"
        assert content(named) == content(ask(client, served, "green"))
        client.post(f"{served.url}/admin/unload", json={"model": "mine"}, headers=BOSS)
        assert ask(client, served, "mine").status_code == 404
        client.post(f"{served.url}/admin/load", json={"model": "mine"}, headers=BOSS)
        assert ask(client, served, "mine").status_code == 200


def test_no_answer_is_wrong_and_none_is_lost_while_workers_are_killed():
    """The short form of benchmarks/fleet_kills.py, which asks 10,000 times."""
    storm, _ = load_storm().run(150, 1.0, "--workers", 2, kills=1)
    assert storm.faults == []
    assert storm.count["right"] >= 150
    assert (storm.count["wrong"], storm.count["lost"]) == (0, 0)
    assert storm.kills >= 1
    assert storm.count["lorasmith_fleet_retries_total"] + storm.count["asked again by the client"] >= 1
