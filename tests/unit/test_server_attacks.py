"""What a hostile client may try: bombs, odd texts, slow reading, races, names that are not theirs."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress

import pytest

from lorasmith.formats import read_adapter, write_adapter
from lorasmith.server import create_app
from lorasmith.server.keys import Tenant
from tests.support.server import bearer, chat, chat_body, make_gateway, make_keys, talk, write_place

BOSS = bearer("boss")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


def post_raw(client, body, path="/v1/completions"):
    return client.post(path, content=body, headers={"content-type": "application/json"})


def test_a_hundred_thousand_prompts_are_refused_before_one_is_read(place):
    gateway = make_gateway(place)
    tokenised = []
    encode = gateway.base.tokenizer.encode
    gateway.base.tokenizer.encode = lambda *a, **k: tokenised.append(1) or encode(*a, **k)

    async def conversation(client):
        began = time.monotonic()
        response = await client.post(
            "/v1/completions", json={"model": "red", "prompt": ["a"] * 100_000, "n": 128}
        )
        return response, time.monotonic() - began

    response, took = talk(gateway, conversation)
    assert response.status_code == 400
    assert "at most 8" in response.json()["error"]["message"]
    assert not tokenised
    assert took < 5


@pytest.mark.parametrize(
    "body",
    [
        '{"model": "red", "prompt": "\\ud800"}',
        '{"model": "\\ud800", "prompt": "x"}',
        '{"model": "red", "prompt": "x", "\\ud800": 1}',
        '{"model": "red", "prompt": "x", "user": "\\udfff"}',
        '{"model": "red", "prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"model": "red", "prompt": "x", "seed": ' + "9" * 5000 + "}",
        '{"model": "red", "prompt": "x", "temperature": NaN}',
        '{"model": "red", "prompt": "x", "temperature": 1e999}',
        '{"model": "red", "prompt": [-1]}',
        '{"model": "red", "prompt": [999999999999999999999999]}',
        '{"model": "red", "prompt": [true]}',
        '{"model": "red", "prompt": []}',
        '{"model": "red", "prompt": [[]]}',
        "null",
        "[]",
        '"text"',
    ],
    ids=range(16),
)
def test_odd_bodies_are_the_clients_fault(place, body):
    response = talk(make_gateway(place), lambda client: post_raw(client, body))
    assert response.status_code in (400, 404), response.text
    json.loads(response.content)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "text", "text": "\ud800"}]},
        {"role": "user", "content": [{"type": "text", "text": 5}]},
        {"role": "user", "content": "x", "name": "\ud800"},
        {"role": "user", "content": [{"type": "text", "text": "x", "\ud800": 1}]},
        {"role": "assistant", "content": None},
    ],
    ids=range(5),
)
def test_odd_messages_are_the_clients_fault(place, message):
    body = json.dumps({"model": "red", "messages": [message], "max_tokens": 1})
    response = talk(make_gateway(place), lambda client: post_raw(client, body, "/v1/chat/completions"))
    assert response.status_code in (200, 400), response.text
    json.loads(response.content)


def test_requests_that_are_still_being_read_are_bounded(place):
    tenant = Tenant("t", max_waiting=2)
    gateway = make_gateway(place, keys=make_keys(tenant, Tenant("u")), max_rows=1)
    encode = gateway.base.tokenizer.encode

    def slow(*arguments, **named):
        time.sleep(0.2)
        return encode(*arguments, **named)

    gateway.base.tokenizer.encode = slow

    async def conversation(client):
        many = [chat(client, "red", max_tokens=1, headers=bearer("key-t")) for _ in range(8)]
        answers = await asyncio.gather(*many, chat(client, "red", max_tokens=1, headers=bearer("key-u")))
        return [r.status_code for r in answers]

    *mine, other = talk(gateway, conversation)
    assert other == 200
    may_run_and_wait = gateway.queue.max_rows + 2
    assert sorted(mine) == [200] * may_run_and_wait + [429] * (8 - may_run_and_wait)


def test_a_client_that_does_not_read_gives_its_rows_back_in_time(place):
    gateway = make_gateway(place, request_timeout_s=0.3)
    app = create_app(gateway)
    raw = json.dumps(chat_body("red", stream=True)).encode()

    async def one() -> None:
        received = asyncio.Queue()
        received.put_nowait({"type": "http.request", "body": raw, "more_body": False})

        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # its window is full, for ever

        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")], "http_version": "1.1",
            "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1), "root_path": "",
        }  # fmt: skip
        with suppress(Exception):
            await app(scope, received.get, send)

    async def conversation(client):
        await asyncio.wait_for(one(), 10)
        return gateway.queue.is_idle, (await chat(client, "red")).status_code

    assert talk(gateway, conversation) == (True, 200)


def test_an_upload_cannot_change_once_it_is_being_checked(place):
    gateway = make_gateway(place, keys=make_keys(Tenant("user"), admin="boss"))
    red = place / "adapters" / "red"

    async def conversation(client):
        upload = (await client.post("/admin/uploads", json={}, headers=BOSS)).json()["upload"]
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            sent = await client.put(
                f"/admin/uploads/{upload}/{name}", content=(red / name).read_bytes(), headers=BOSS
            )
            assert sent.status_code == 200
        goes_on = asyncio.Event()

        async def slowly():
            yield b"x"
            await goes_on.wait()
            yield b"y"

        file = f"/admin/uploads/{upload}/lorasmith.json"
        writing = asyncio.ensure_future(client.put(file, content=slowly(), headers=BOSS))
        await asyncio.sleep(0.2)
        add = {"name": "new", "upload": upload}
        during = await client.post("/admin/adapters", json=add, headers=BOSS)
        dropped = await client.delete(f"/admin/uploads/{upload}", headers=BOSS)
        goes_on.set()
        await writing
        sent = await client.put(file, content=b"", headers=BOSS)
        both = await asyncio.gather(
            *(client.post("/admin/adapters", json=add, headers=BOSS) for _ in range(2))
        )
        late = await client.put(file, content=b"{}", headers=BOSS)
        return during.status_code, dropped.status_code, sorted(r.status_code for r in both), late.status_code

    during, dropped, both, late = talk(gateway, conversation)
    assert (during, dropped) == (400, 400), "a file is still coming in"
    assert both == [404, 422], "it is used once; an empty sidecar is refused"
    assert late == 404
    assert not list((place / "store" / "staging").iterdir())


def test_no_more_uploads_than_allowed_however_fast_they_are_asked_for(place):
    gateway = make_gateway(place, keys=make_keys(Tenant("user"), admin="boss"))

    async def conversation(client):
        many = (client.post("/admin/uploads", json={}, headers=BOSS) for _ in range(40))
        return sorted([r.status_code for r in await asyncio.gather(*many)])

    assert talk(gateway, conversation) == [200] * 16 + [429] * 24


@pytest.mark.parametrize("base", ["text", [1], {"fingerprint": "text"}, {"fingerprint": {"weights": 1}}])
def test_an_upload_whose_sidecar_is_odd_is_refused_not_a_fault(place, tmp_path, base):
    gateway = make_gateway(place, keys=make_keys(Tenant("user"), admin="boss"))
    adapter = read_adapter(place / "adapters" / "red")
    adapter.provenance = {"base": base}
    write_adapter(adapter, tmp_path / "odd")

    async def conversation(client):
        upload = (await client.post("/admin/uploads", json={}, headers=BOSS)).json()["upload"]
        for file in (tmp_path / "odd").iterdir():
            await client.put(f"/admin/uploads/{upload}/{file.name}", content=file.read_bytes(), headers=BOSS)
        return await client.post("/admin/adapters", json={"name": "odd", "upload": upload}, headers=BOSS)

    assert talk(gateway, conversation).status_code == 400


def test_names_that_come_and_go_while_models_are_listed(place):
    gateway = make_gateway(place)
    versions = gateway.store.versions

    def racing(*arguments):
        found = versions(*arguments)
        return [v for v in found if v.name != "blue"]  # removed by another process a moment ago

    gateway.store.versions = racing
    listed = talk(gateway, lambda client: client.get("/v1/models"))
    assert listed.status_code == 200
    assert "blue" not in [m["id"] for m in listed.json()["data"]]


def test_series_of_versions_that_are_gone_leave_the_metrics(place):
    gateway = make_gateway(place)

    async def conversation(client):
        for model in ("red", "green"):
            await chat(client, model, stream=True)
        before = (await client.get("/metrics")).text
        gateway.metrics.forget({("green", "1")})
        return before, (await client.get("/metrics")).text

    before, after = talk(gateway, conversation)
    assert 'lorasmith_requests_total{adapter="red"' in before
    assert 'lorasmith_requests_total{adapter="red"' not in after
    assert 'lorasmith_requests_total{adapter="green"' in after


def test_a_clock_that_jumps_changes_no_order_and_no_limit(place, monkeypatch):
    gateway = make_gateway(place, keys=make_keys(Tenant("t", requests_per_minute=3), admin="boss"))
    moments = iter([2e9, 1.0, 3e9, 0.0, 1e9] * 200)
    monkeypatch.setattr(time, "time", lambda: next(moments))

    async def conversation(client):
        for model in ("green", "blue", "red"):
            moved = {"alias": "prod", "model": model}
            assert (await client.post("/admin/alias", json=moved, headers=BOSS)).status_code == 200
        back = (await client.post("/admin/rollback", json={"alias": "prod"}, headers=BOSS)).json()
        audit = (await client.get("/admin/audit", headers=BOSS)).json()["entries"]
        answers = [(await chat(client, "prod", headers=bearer("key-t"))).status_code for _ in range(4)]
        ready = (await client.get("/ready", headers=BOSS)).status_code
        return back["name"], [e["number"] for e in audit], answers, ready

    name, numbers, answers, ready = talk(gateway, conversation)
    assert name == "blue"
    assert numbers == sorted(numbers, reverse=True)
    assert answers == [200, 200, 200, 429]
    assert ready == 200


def test_an_adapter_that_is_held_is_not_pushed_out(place):
    gateway = make_gateway(place, max_adapters=1)
    adapters, digests = gateway.adapters, [gateway.store.resolve(n).digest for n in ("red", "green")]
    with adapters.held(digests[0], None):
        adapters.load(digests[1], None)
        assert digests[0] in gateway.engine.adapters
    assert len(adapters.loaded) == 1
    adapters.unload(digests[0])
    with pytest.raises(LookupError), adapters.held(digests[0], None):
        pass
    assert not adapters._holds
    gateway.engine.close()


def test_unloaded_while_it_is_read_is_not_served(place):
    gateway = make_gateway(place)
    digest = gateway.store.resolve("red").digest
    add = gateway.engine.add_adapter

    def unloaded_meanwhile(name, path):
        gateway.adapters.unload(digest)
        return add(name, path)

    gateway.engine.add_adapter = unloaded_meanwhile
    with pytest.raises(LookupError):
        gateway.adapters.load(digest, None)
    assert digest not in gateway.engine.adapters
    assert not gateway.adapters.loaded
    gateway.engine.close()
