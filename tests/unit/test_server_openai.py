"""OpenAI's API in process: the right adapter answers, and says so."""

from __future__ import annotations

import asyncio

import pytest

from lorasmith.bases import load_base
from lorasmith.engine import Engine, Request
from lorasmith.store import Store
from tests.support.server import (
    BASE_ID,
    NAMES,
    chat,
    chat_body,
    events,
    make_gateway,
    streamed_text,
    talk,
    write_place,
)

PROMPTS = ("hello", "what is it", "one two three")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def alone(place):
    """The answer of each adapter to each prompt, from an engine that knows nothing else."""
    answers = {}
    base = load_base(place / BASE_ID, dtype="fp32")
    for name in (None, *NAMES):
        engine = Engine(base, max_rows=1, prefix_cache_bytes=0)
        if name is not None:
            engine.add_adapter(name, place / "adapters" / name)
        for prompt in PROMPTS:
            (result,) = engine.generate([Request(prompt, adapter=name, max_tokens=8)])
            answers[name or BASE_ID, prompt] = result
        engine.close()
    texts = {(k, p): r.token_ids for (k, p), r in answers.items()}
    assert len({texts[k, PROMPTS[0]] for k in (BASE_ID, *NAMES)}) == 4, (
        "the adapters must differ to prove anything"
    )
    return answers


def test_every_adapter_gives_its_own_answer_in_any_company(place, alone):
    async def conversation(client):
        asked = [(model, prompt) for prompt in PROMPTS for model in (BASE_ID, *NAMES)] * 3
        answers = await asyncio.gather(
            *(chat(client, m, p, stream=i % 2 == 0) for i, (m, p) in enumerate(asked))
        )
        return list(zip(asked, answers, strict=True))

    for number, ((model, prompt), response) in enumerate(talk(make_gateway(place), conversation)):
        assert response.status_code == 200, response.text
        expected = alone[model, prompt]
        if number % 2 == 0:
            chunks = events(response)
            said, about = streamed_text(chunks), chunks[-1]["lorasmith"]
        else:
            said, about = response.json()["choices"][0]["message"]["content"], response.json()["lorasmith"]
        assert said == expected.text
        assert about["adapter_digest"] == expected.adapter_digest
        assert response.headers["x-lorasmith-adapter-digest"] == (expected.adapter_digest or "none")


def test_alias_version_and_digest_reach_the_same_weights(place, alone, tmp_path):
    digest = alone["red", "hello"].adapter_digest
    gateway = make_gateway(place)

    async def conversation(client):
        return [await chat(client, model) for model in ("red", "red@1", digest)]

    for response in talk(gateway, conversation):
        body = response.json()
        assert body["choices"][0]["message"]["content"] == alone["red", "hello"].text
        assert body["model"] == "red@1"
        assert body["lorasmith"] == {
            "adapter": "red", "adapter_digest": digest, "adapter_version": 1, "base": BASE_ID,
            "base_fingerprint": gateway.base_fingerprint,
        }  # fmt: skip
        assert response.headers["x-lorasmith-adapter-version"] == "1"
        assert (
            response.headers["x-lorasmith-base-fingerprint"]
            == gateway.base_fingerprint
            == body["system_fingerprint"]
        )


@pytest.mark.parametrize(
    "model",
    ["nobody", "red@2", "red@x", "", "0" * 64, "../red", "/etc/passwd", "base", "RED", "red@", "tiny@1"],
)
def test_an_unknown_adapter_is_404_and_never_the_base(place, model):
    async def conversation(client):
        return [await chat(client, model), await chat(client, model, stream=True)]

    for response in talk(make_gateway(place), conversation):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert "choices" not in response.json()


def test_models_lists_the_base_and_every_alias(place):
    async def conversation(client):
        return (await client.get("/v1/models")).json(), (await client.get("/v1/models/red@1")).json()

    listed, one = talk(make_gateway(place), conversation)
    assert [m["id"] for m in listed["data"]] == [BASE_ID, *sorted(NAMES)]
    assert [m["parent"] for m in listed["data"]] == [None, *[BASE_ID] * 3]
    assert one["lorasmith"]["digest"] == next(
        m["lorasmith"]["digest"] for m in listed["data"] if m["id"] == "red"
    )
    assert str(place) not in str(listed)


def test_streaming_reports_usage_and_the_same_as_one_piece(place):
    async def conversation(client):
        whole = await chat(client, "red")
        streamed = await chat(client, "red", stream=True, stream_options={"include_usage": True})
        return whole.json(), events(streamed)

    whole, chunks = talk(make_gateway(place), conversation)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert streamed_text(chunks) == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"] == []
    usage, expected = chunks[-1]["usage"], whole["usage"]
    assert {k: usage[k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        k: expected[k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"


def test_completions_take_raw_text_and_token_ids(place):
    base = load_base(place / BASE_ID, dtype="fp32")
    ids = base.tokenizer.encode("abc")
    engine = Engine(base, max_rows=1)
    (expected,) = engine.generate([Request(ids, max_tokens=5)])

    async def conversation(client):
        common = {"model": BASE_ID, "max_tokens": 5, "temperature": 0, "logprobs": 0}
        one = await client.post("/v1/completions", json=common | {"prompt": "abc"})
        many = await client.post("/v1/completions", json=common | {"prompt": [ids, ids], "n": 2})
        return one.json(), many.json()

    one, many = talk(make_gateway(place), conversation)
    assert one["object"] == "text_completion"
    assert one["choices"][0]["text"] == expected.text
    assert len(one["choices"][0]["logprobs"]["token_logprobs"]) == 5
    assert [c["text"] for c in many["choices"]] == [expected.text] * 4
    assert many["usage"]["prompt_tokens"] == 2 * len(ids)
    assert many["usage"]["completion_tokens"] == 4 * 5


def test_choices_differ_by_seed_and_a_seed_repeats(place):
    async def conversation(client):
        settings = dict(temperature=2.0, seed=7, n=3)
        first = (await chat(client, "red", **settings)).json()
        again = events(await chat(client, "red", stream=True, **settings))
        return first, again

    first, again = talk(make_gateway(place), conversation)
    texts = [c["message"]["content"] for c in first["choices"]]
    assert len(set(texts)) == 3
    assert [streamed_text(again, i) for i in range(3)] == texts


def test_stop_logprobs_and_content_parts(place, alone):
    text = alone["red", "hello"].text
    stop = text[2:4]

    async def conversation(client):
        stopped = (await chat(client, "red", stop=stop)).json()
        parts = [
            {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
        ]
        body = chat_body("red", logprobs=True) | {"messages": parts}
        scored = (await client.post("/v1/chat/completions", json=body)).json()
        return stopped, scored

    stopped, scored = talk(make_gateway(place), conversation)
    assert stopped["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert scored["choices"][0]["message"]["content"] == text
    assert all(entry["logprob"] <= 0 for entry in scored["choices"][0]["logprobs"]["content"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temprature": 1}, 'Did you mean "temperature"'),
        ({"tools": [{"type": "function"}]}, '"tools" is not supported'),
        ({"frequency_penalty": 0.5}, '"frequency_penalty" is not supported'),
        ({"response_format": {"type": "json_object"}}, '"response_format" is not supported'),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"n": 9}, "at most 8"),
        ({"max_tokens": 10_000}, "one request may hold 512"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "one request may hold 512"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(place, settings, message):
    async def conversation(client):
        refused = await chat(client, "red", **settings)
        streamed = await chat(client, "red", stream=True, **settings)
        return refused, streamed, await chat(client, "red")

    refused, streamed, after = talk(make_gateway(place), conversation)
    for response in (refused, streamed):
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]
        assert response.json()["error"]["request_id"] == response.headers["x-request-id"]
    assert after.status_code == 200


def test_settings_that_change_nothing_are_accepted(place):
    async def conversation(client):
        neutral = {"frequency_penalty": 0, "logit_bias": {}, "metadata": {"a": "b"}, "user": "u", "tools": []}
        return await chat(client, "red", **neutral, response_format={"type": "text"})

    assert talk(make_gateway(place), conversation).status_code == 200


def test_a_version_that_moves_is_served_at_once_and_nothing_stale(place, alone, tmp_path):
    """Same name, other weights, same prompt: the prefix cache must not bring the old ones back."""
    write_place(tmp_path, names=("red",))
    store = Store(tmp_path / "store")
    gateway = make_gateway(tmp_path)

    async def conversation(client):
        answers = [(await chat(client, "red")).json()]
        store.add("red", place / "adapters" / "green")
        answers.append((await chat(client, "red")).json())
        store.rollback("red")
        answers.append((await chat(client, "red")).json())
        store.remove("red@2")
        return answers, await chat(client, "red@2")

    answers, gone = talk(gateway, conversation)
    expected = [alone[name, "hello"] for name in ("red", "green", "red")]
    assert [a["choices"][0]["message"]["content"] for a in answers] == [e.text for e in expected]
    assert [a["lorasmith"]["adapter_version"] for a in answers] == [1, 2, 1]
    assert gone.status_code == 404


def test_more_adapters_than_may_be_loaded_still_all_answer_rightly(place, alone):
    gateway = make_gateway(place, max_adapters=1)

    async def conversation(client):
        asked = [NAMES[i % 3] for i in range(12)]
        return list(zip(asked, await asyncio.gather(*(chat(client, name) for name in asked)), strict=True))

    answers = talk(gateway, conversation)
    assert all(r.json()["choices"][0]["message"]["content"] == alone[n, "hello"].text for n, r in answers)
