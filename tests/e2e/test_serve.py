"""`lorasmith serve` as a process of its own, over a real socket, with the `openai` package."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import time

import httpx
import openai
import pytest
from typer.testing import CliRunner

from lorasmith.cli.app import app
from lorasmith.server import hash_key
from tests.support.served import Served
from tests.support.server import BASE_ID, NAMES, bearer, chat_body, write_place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"), context=16_384)


@pytest.fixture(scope="module")
def served(place):
    # room for hardly one adapter: requests bring each back from disk
    server = Served(place, "--adapters", f"again={place / 'adapters' / 'red'}", "--adapter-memory", "20kB")
    yield server
    assert server.stop() == 0, "".join(server.lines)


def wait_until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def metric(served, name):
    text = httpx.get(f"{served.url}/metrics").text
    return next(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + " "))


def test_the_openai_package_works_unchanged(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == [BASE_ID, "again", *sorted(NAMES)]
        settings = dict(messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0)
        whole = client.chat.completions.create(model="red", **settings)
        assert whole.choices[0].finish_reason in ("stop", "length")
        assert whole.usage.completion_tokens == 8
        assert whole.lorasmith["adapter_version"] == 1
        stream = client.chat.completions.create(
            model="red", stream=True, stream_options={"include_usage": True}, **settings
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
        raw = client.chat.completions.with_raw_response.create(model="again", **settings)
        assert raw.headers["x-lorasmith-adapter-digest"] == whole.lorasmith["adapter_digest"]
        assert raw.parse().choices[0].message.content == text
        plain = client.completions.create(model=BASE_ID, prompt="ab", max_tokens=4, temperature=0)
        assert plain.usage.completion_tokens == 4
        pieces = client.completions.create(
            model=BASE_ID, prompt="ab", max_tokens=4, temperature=0, stream=True
        )
        assert "".join(p.choices[0].text for p in pieces) == plain.choices[0].text
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(model="nobody", **settings)
        with pytest.raises(openai.BadRequestError, match="not supported"):
            client.chat.completions.create(model="red", presence_penalty=1.0, **settings)


def test_many_clients_at_once_each_get_their_own(served):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:

            async def one(model):
                settings = dict(messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0)
                stream = await client.chat.completions.create(model=model, stream=True, **settings)
                return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

            alone = {model: await one(model) for model in (BASE_ID, *NAMES)}
            asked = [(BASE_ID, *NAMES)[i % 4] for i in range(24)]
            return alone, list(zip(asked, await asyncio.gather(*map(one, asked)), strict=True))

    alone, together = asyncio.run(run())
    assert len(set(alone.values())) == 4
    assert all(alone[model] == text for model, text in together)


def test_a_client_that_leaves_frees_its_row(served):
    body = chat_body("red", max_tokens=16_000, stream=True, ignore_eos=True)
    with (
        httpx.Client() as client,
        client.stream("POST", f"{served.url}/v1/chat/completions", json=body) as response,
    ):
        pieces = response.iter_bytes()  # kept: a generator that is collected closes the connection
        assert next(pieces)
        assert metric(served, "lorasmith_running_rows") == 1
    wait_until(lambda: metric(served, "lorasmith_running_rows") == 0, 3)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{served.url}/v1/chat/completions",
            json=chat_body("red", max_tokens=16_000, ignore_eos=True),
            timeout=httpx.Timeout(5, read=0.05),
        )
    wait_until(lambda: metric(served, "lorasmith_running_rows") == 0, 3)
    text = httpx.get(f"{served.url}/metrics").text
    assert 'outcome="disconnected"' in text


def test_garbage_on_the_socket_harms_nobody(served):
    host, port = re.match(r"http://(.+):(\d+)", served.url).groups()
    for raw in (
        b"\x00\xff\x00garbage\r\n\r\n",
        b"GET /" + b"a" * 70000,
        b"POST /v1/completions HTTP/1.1\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=5) as raw_socket:
            raw_socket.sendall(raw)
    assert httpx.get(f"{served.url}/healthz").json() == {"status": "alive"}


def test_sigterm_lets_running_answers_finish(place):
    server = Served(place, "--drain-s", 20)
    body = chat_body("red", max_tokens=3000, stream=True, ignore_eos=True)
    with (
        httpx.Client(timeout=30) as client,
        client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response,
    ):
        pieces = response.iter_text()
        text = next(pieces)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=chat_body("red"))
        text += "".join(pieces)
    assert refused.status_code == 503
    assert text.rstrip().endswith("data: [DONE]")
    assert text.count('"finish_reason": "length"') == 1
    assert server.stop(0) == 0, "no second signal is needed"
    logged = [json.loads(line) for line in server.lines if line.startswith("{")]
    assert any(line["message"] == "draining" for line in logged)
    assert not any("hello" in json.dumps(line) for line in logged)


def test_keys_guard_a_real_server(place, tmp_path):
    keys = tmp_path / "keys.toml"
    made = CliRunner().invoke(app, ["key", "--json"])
    key = json.loads(made.stdout)
    keys.write_text(
        f'[admin]\nkeys = ["{hash_key("boss")}"]\n[tenants.a]\nkeys = ["{key["hash"]}"]\nadapters = ["red"]\n'
    )
    server = Served(place, "--keys", keys)
    try:
        models = httpx.get(f"{server.url}/v1/models", headers=bearer(key["key"])).json()["data"]
        assert [m["id"] for m in models] == ["red"]
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/ready", headers=bearer("boss")).status_code == 200
        assert httpx.get(f"{server.url}/healthz").status_code == 200
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "--keys FILE"),
        (("--adapters", "red"), "write name=DIR"),
        (("--adapters", "red=/nowhere"), "does not exist"),
        (("--keys", "/nowhere.toml"), "cannot be read"),
        (("--adapter-memory", "lots"), "given as a size"),
        (("--engine", "rya"), 'Did you mean "ray"'),
        (("--max-workers", "3"), "is for --engine ray"),
        (("--engine", "ray", "--workers", "3", "--max-workers", "2"), "is less than --workers 3"),
    ],
)
def test_bad_input_exits_with_2(place, options, message, tmp_path):
    result = CliRunner().invoke(
        app, ["serve", "--base", str(place / BASE_ID), "--store", str(tmp_path / "store"), *options]
    )
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--base", "/nowhere"), "/nowhere"),
        (("--quantize", "nf5"), 'Did you mean "nf4"'),
        (("--base", "/nowhere", "--workers", "2"), "/nowhere"),
    ],
)
def test_a_base_that_cannot_be_is_told_before_a_store_is_made(place, options, message, tmp_path):
    store = tmp_path / "store"
    result = CliRunner().invoke(
        app, ["serve", "--base", str(place / BASE_ID), "--store", str(store), *options]
    )
    assert result.exit_code == 2
    assert message in result.stderr
    assert not store.exists()
