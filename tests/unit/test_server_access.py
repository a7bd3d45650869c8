"""Who may ask what: keys, tenants, limits, and what the guard turns away before any route."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket

import pytest

from lorasmith import errors
from lorasmith.errors import AccessError, ConfigError, OverloadedError
from lorasmith.server import STATUS, check_address, check_exposure, hash_key, new_key, read_keys
from lorasmith.server.fairness import FairQueue
from lorasmith.server.keys import Keys, Tenant
from lorasmith.server.limits import Bucket, Quotas
from tests.support.server import BASE_ID, bearer, chat, make_gateway, make_keys, talk, write_place

ACME = Tenant("acme", adapters=("red", "gr*"))
OTHER = Tenant("other", adapters=("blue", BASE_ID))
ROUTES = [
    ("POST", "/v1/chat/completions", "tenant"),
    ("POST", "/v1/completions", "tenant"),
    ("GET", "/v1/models", "tenant"),
    ("GET", "/v1/models/red", "tenant"),
    ("GET", "/playground/api/card?model=red", "tenant"),
    ("GET", "/playground/api/live", "tenant"),
    ("GET", "/metrics", "monitor"),
    ("GET", "/ready", "monitor"),
    ("GET", "/admin/status", "admin"),
    ("GET", "/admin/adapters", "admin"),
    ("GET", "/admin/audit", "admin"),
    ("POST", "/admin/load", "admin"),
    ("POST", "/admin/unload", "admin"),
    ("POST", "/admin/alias", "admin"),
    ("POST", "/admin/canary", "admin"),
    ("POST", "/admin/rollback", "admin"),
    ("POST", "/admin/remove", "admin"),
    ("POST", "/admin/drain", "admin"),
    ("POST", "/admin/uploads", "admin"),
    ("PUT", "/admin/uploads/x/adapter_config.json", "admin"),
    ("DELETE", "/admin/uploads/x", "admin"),
    ("POST", "/admin/adapters", "admin"),
    ("GET", "/openapi.json", "any"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


def keyed(place, **options):
    return make_gateway(place, keys=make_keys(ACME, OTHER, admin="boss", monitor="eye"), **options)


def test_the_table_above_names_every_route(place):
    async def conversation(client):
        return (await client.get("/openapi.json", headers=bearer("boss"))).json()

    listed = {
        (m.upper(), p) for p, methods in talk(keyed(place), conversation)["paths"].items() for m in methods
    }
    ours = {(m, p.partition("?")[0]) for m, p, _ in ROUTES} - {("GET", "/openapi.json")}
    ours = {(m, p.replace("/x", "/{upload}").replace("adapter_config.json", "{file}")) for m, p in ours}
    ours = {(m, p.replace("/models/red", "/models/{model}")) for m, p in ours}
    assert listed == ours | {("GET", "/healthz")}


@pytest.mark.parametrize(("method", "path", "role"), ROUTES)
def test_every_route_but_liveness_needs_the_right_key(place, method, path, role):
    async def conversation(client):
        async def status(headers):
            body = None if method == "GET" else b"{}"
            json_type = {"content-type": "application/json"}
            response = await client.request(method, path, content=body, headers=json_type | headers)
            return response.status_code

        tokens = {"tenant": "key-acme", "admin": "boss", "monitor": "eye"}
        codes = {who: await status(bearer(token)) for who, token in tokens.items()}
        bad = [await status(h) for h in ({}, bearer("wrong"), bearer(""), {"authorization": "key-acme"})]
        return codes, bad, (await client.get("/healthz")).status_code

    codes, bad, live = talk(keyed(place), conversation)
    assert bad == [401] * 4
    assert live == 200
    allowed = {"any": {"tenant", "admin", "monitor"}, "monitor": {"admin", "monitor"}}.get(role, {role})
    if path == "/admin/drain":
        allowed = {"admin"}
    for who, code in codes.items():
        assert (code != 401) == (who in allowed), f"{who} got {code}"


def test_another_tenants_adapter_looks_like_one_that_does_not_exist(place):
    gateway = keyed(place)
    digest = gateway.store.resolve("blue").digest

    async def conversation(client):
        async def ask(model):
            return await chat(client, model, headers=bearer("key-acme"))

        listed = await client.get("/v1/models", headers=bearer("key-acme"))
        mine = [await ask(m) for m in ("red", "green", "red@1")]
        foreign = [await ask(m) for m in ("blue", "blue@1", digest, BASE_ID, "nobody")]
        peeked = await client.get("/v1/models/blue", headers=bearer("key-acme"))
        return listed.json(), mine, foreign, peeked

    listed, mine, foreign, peeked = talk(gateway, conversation)
    assert [m["id"] for m in listed["data"]] == ["green", "red"]
    assert [r.status_code for r in mine] == [200] * 3
    assert [r.status_code for r in foreign] == [404] * 5
    assert peeked.status_code == 404
    texts = {r.json()["error"]["message"].split('"')[2] for r in foreign}
    assert len(texts) == 1, "the message must not tell a foreign adapter from none"


def test_no_answer_without_keys_from_a_foreign_host_name(place):
    async def conversation(client):
        good = await chat(client, "red")
        bad = await chat(client, "red", headers={"host": "evil.example"})
        port = await chat(client, "red", headers={"host": "127.0.0.1:8000"})
        return good.status_code, bad.status_code, port.status_code

    assert talk(make_gateway(place), conversation, local_only=True) == (200, 404, 200)


def test_without_an_admin_key_there_is_no_admin_api(place):
    async def conversation(client):
        return [
            (await client.get("/admin/status")).status_code,
            (await client.get("/admin/status", headers=bearer("guess"))).status_code,
            (await client.get("/metrics")).status_code,
        ]

    assert talk(make_gateway(place), conversation) == [404, 404, 200]


def test_bodies_have_limits(place):
    gateway = make_gateway(place, max_body_bytes=2000)

    async def conversation(client):
        async def post(content, kind="application/json"):
            return await client.post("/v1/completions", content=content, headers={"content-type": kind})

        async def pieces():
            for _ in range(5):
                yield b" " * 1000

        large = json.dumps({"model": "red", "prompt": "x" * 3000})
        deep = "[" * 900 + "]" * 900
        return [
            (await post(large)).status_code,
            (await post(pieces())).status_code,
            (await post("{}", "text/plain")).status_code,
            (await post("{no json")).status_code,
            (await post(b"\xff\xfe")).status_code,
            (await post('{"model":"red","prompt":' + deep + "}")).status_code,
            (await post("{}")).status_code,
            (await client.get("/nowhere")).status_code,
            (await client.get("/v1/completions")).status_code,
        ]

    assert talk(gateway, conversation) == [413, 413, 415, 400, 400, 400, 400, 404, 405]


def test_a_rate_limit_says_when_to_come_back(place):
    slow = Tenant("slow", requests_per_minute=2)
    gateway = make_gateway(place, keys=make_keys(slow, OTHER))

    async def conversation(client):
        answers = [await chat(client, "red", headers=bearer("key-slow")) for _ in range(3)]
        return answers, await chat(client, "blue", headers=bearer("key-other"))

    answers, other = talk(gateway, conversation)
    assert [r.status_code for r in answers] == [200, 200, 429]
    assert 25 <= int(answers[2].headers["retry-after"]) <= 31
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert other.status_code == 200


def test_tokens_that_were_not_used_are_given_back(place):
    tenant = Tenant("t", tokens_per_minute=300)
    gateway = make_gateway(place, keys=make_keys(tenant))

    async def conversation(client):
        first = await chat(client, "red", max_tokens=200, stop=["\n", "a", "e", " "], headers=bearer("key-t"))
        return first.json(), gateway.quotas._bucket(tenant, "tokens", 300)._level

    body, level = talk(gateway, conversation)
    assert level == pytest.approx(300 - body["usage"]["total_tokens"], abs=5)


def test_a_full_queue_is_429_and_the_others_are_answered(place):
    gateway = make_gateway(place, max_rows=1, lookahead_rows=0, max_waiting=3)

    async def conversation(client):
        return await asyncio.gather(*(chat(client, "red", max_tokens=30) for _ in range(8)))

    answers = talk(gateway, conversation)
    codes = sorted(r.status_code for r in answers)
    assert codes == [200] * 4 + [429] * 4
    assert all(int(r.headers["retry-after"]) >= 1 for r in answers if r.status_code == 429)


def test_a_deadline_ends_what_waits_and_what_runs(place):
    gateway = make_gateway(place, max_rows=1, lookahead_rows=0, request_timeout_s=0.4)
    original = gateway.engine.scheduler.step

    def slow():
        import time

        time.sleep(0.05)
        return original()

    gateway.engine.scheduler.step = slow

    async def conversation(client):
        whole, streamed, waiting = await asyncio.gather(
            chat(client, "red", max_tokens=100),
            chat(client, "red", max_tokens=100, stream=True),
            chat(client, "green", max_tokens=100),
        )
        await asyncio.sleep(0.3)
        return whole, streamed, waiting, gateway.queue.is_idle, gateway.engine.scheduler.is_idle

    whole, streamed, waiting, queue_idle, engine_idle = talk(gateway, conversation)
    codes = sorted([whole.status_code, streamed.status_code, waiting.status_code])
    assert codes.count(504) >= 2
    assert queue_idle
    assert engine_idle


def test_keys_are_read_with_all_faults_at_once(tmp_path):
    key = new_key()
    good = tmp_path / "good.toml"
    good.write_text(
        f'[admin]\nkeys = ["{hash_key("boss")}"]\n[tenants.acme]\nkeys = ["{hash_key(key)}"]\n'
        'adapters = ["a*"]\nrequests_per_minute = 60\n'
    )
    keys = read_keys(good)
    assert keys.identify(f"Bearer {key}").tenant == Tenant("acme", ("a*",), 60)
    assert keys.identify("bearer boss").role == "admin"
    with pytest.raises(AccessError):
        keys.identify("Bearer nope")
    bad = tmp_path / "bad.toml"
    bad.write_text(
        '[tenant.x]\n[tenants.a]\nkeys = ["plain-secret"]\nrequest_per_minute = 1\ntokens_per_minute = -1\n'
    )
    with pytest.raises(ConfigError) as told:
        read_keys(bad)
    for part in (
        'Did you mean "tenants"',
        "never written down",
        'Did you mean "requests_per_minute"',
        "above 0",
    ):
        assert part in str(told.value)
    assert "plain-secret" not in str(told.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.com"])
def test_other_machines_need_keys(host):
    with pytest.raises(ConfigError, match="--keys FILE"):
        check_exposure(host, Keys(), insecure=False)
    assert check_exposure(host, Keys(), insecure=True) is False
    assert check_exposure(host, make_keys(ACME), insecure=False) is False
    assert all(check_exposure(h, Keys(), insecure=False) for h in ("127.0.0.1", "::1", "localhost"))


def test_every_error_of_ours_has_a_status():
    classes = {
        c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.LoraSmithError)
    }
    assert set(STATUS) == classes
    assert all(400 <= status < 600 for status, _, _ in STATUS.values())


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_refills_at_its_rate():
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert bucket.wait_s(1) == 1.0
    clock.now = 0.5
    assert bucket.wait_s(1) == 0.5
    clock.now = 1000
    assert bucket.wait_s(61) == 0, "more than a minute's worth needs a full bucket only"
    bucket.take(120)
    assert bucket.wait_s(1) == 61


def test_a_refused_request_takes_nothing_from_either_bucket():
    quotas = Quotas(Clock())
    tenant = Tenant("t", requests_per_minute=10, tokens_per_minute=100)
    quotas.reserve(tenant, 90)
    with pytest.raises(OverloadedError) as told:
        quotas.reserve(tenant, 20)
    assert told.value.retry_after_s == pytest.approx(6)
    assert quotas._bucket(tenant, "requests", 10)._level == 9


def run_queue(arrivals, *, max_rows=1, used=None):
    """Serve `arrivals` (tenant, tokens) that all came at once; return tenants in the order of service."""

    async def run():
        queue = FairQueue(max_rows, max_waiting=1000, max_waiting_per_tenant=1000)
        order = []

        async def one(tenant, tokens):
            ticket = await queue.enter(tenant, 1, tokens)
            order.append(tenant.name)
            await asyncio.sleep(0)
            queue.leave(ticket, tokens if used is None else used)

        await asyncio.gather(*(one(*a) for a in arrivals))
        assert queue.is_idle
        return order

    return asyncio.run(run())


def test_a_tenant_with_many_requests_does_not_hold_up_another():
    heavy, light = Tenant("heavy"), Tenant("light")
    order = run_queue([(heavy, 100)] * 20 + [(light, 100)] * 3)
    assert max(i for i, name in enumerate(order) if name == "light") <= 7


def test_weights_share_the_rows():
    big, small = Tenant("big", weight=3.0), Tenant("small")
    order = run_queue([(big, 100)] * 60 + [(small, 100)] * 60)
    assert 0.7 <= order[:40].count("big") / 40 <= 0.8


def test_a_waiting_request_that_is_cancelled_leaves_no_trace():
    async def run():
        queue = FairQueue(1, max_waiting=10, max_waiting_per_tenant=10)
        tenant = Tenant("t")
        first = await queue.enter(tenant, 1, 10)
        second, third = (asyncio.ensure_future(queue.enter(tenant, 1, 10)) for _ in range(2))
        await asyncio.sleep(0)
        second.cancel()
        queue.leave(first, 10)  # lets in whoever is next, while the cancelled one is still there
        await asyncio.wait([second])
        queue.leave(await third, 10)
        return queue.is_idle, queue.running_rows

    assert asyncio.run(run()) == (True, 0)


def test_a_request_for_more_rows_than_there_are_runs_alone():
    async def run():
        queue = FairQueue(2, max_waiting=10, max_waiting_per_tenant=10)
        small = await queue.enter(Tenant("a"), 1, 10)
        large = asyncio.ensure_future(queue.enter(Tenant("b"), 5, 10))
        await asyncio.sleep(0)
        assert not large.done()
        queue.leave(small, 10)
        queue.leave(await large, 10)
        return queue.running_rows

    assert asyncio.run(run()) == 0


def test_an_address_in_use_is_told_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(errors.OutputError, match="Choose another --port"):
            check_address("127.0.0.1", taken.getsockname()[1])
    check_address("127.0.0.1", 0)
