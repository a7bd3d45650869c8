"""The playground's routes: files that anybody may read, figures and cards that ask for a key."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

import lorasmith.server
from lorasmith.formats import read_adapter, write_adapter
from lorasmith.server import create_app, page
from lorasmith.server.keys import Tenant
from lorasmith.store import Store
from tests.support.server import BASE_ID, bearer, chat, make_gateway, make_keys, talk, write_place

FOLDER = Path(lorasmith.server.__file__).parent / "playground"
ACME, OTHER = Tenant("acme", adapters=("red",)), Tenant("other", adapters=("blue", BASE_ID))
API = ("/playground/api/card?model=red", "/playground/api/live")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


def keyed(place, **options):
    return make_gateway(place, keys=make_keys(ACME, OTHER, admin="boss", monitor="eye"), **options)


def test_the_files_need_no_key_and_know_nothing(place):
    async def conversation(client):
        return {path: await client.get(path) for path in sorted(page.PUBLIC)}

    with_keys, without = talk(keyed(place), conversation), talk(make_gateway(place), conversation)
    assert {p.name for p in FOLDER.iterdir()} == set(page.FILES)
    for path, response in with_keys.items():
        assert response.content == without[path].content
        name = path.rpartition("/")[2]
        if path == "/":
            assert (response.status_code, response.headers["location"]) == (307, "/playground")
        else:
            name = "index.html" if name == "playground" else name
            assert response.content == (FOLDER / name).read_bytes()
            assert response.headers["content-type"].startswith(page.FILES[name])
        assert response.headers["content-security-policy"] == page.POLICY
        assert response.headers["x-content-type-options"] == "nosniff"


def test_only_liveness_and_the_files_are_open_to_everybody(place):
    assert create_app(keyed(place))._public == {"/healthz"} | page.PUBLIC

    async def conversation(client):
        posted = [
            (await client.post(path, json={})).status_code for path in ("/playground", "/playground/app.js")
        ]
        odd = [
            (await client.get(path)).status_code
            for path in (
                "/playground/",
                "/playground/../openapi.json",
                "/playground/%2e%2e/x",
                "/playground/nothing.js",
                "/playground/index.html/x",
                "/playground/style.css%00",
                *API,
            )
        ]
        return posted, odd

    posted, odd = talk(keyed(place), conversation)
    assert posted == [401, 401]
    assert odd == [401] * 8


def test_a_foreign_host_name_gets_no_page(place):
    async def conversation(client):
        return (await client.get("/playground", headers={"host": "evil.example"})).status_code

    assert talk(make_gateway(place), conversation, local_only=True) == 404


def test_the_page_can_be_left_out(place):
    async def conversation(client):
        return [(await client.get(path)).status_code for path in ("/", "/playground", *API)]

    assert talk(make_gateway(place, playground=False), conversation) == [404] * 4
    assert talk(keyed(place, playground=False), conversation) == [401] * 4


def test_nothing_is_asked_from_elsewhere():
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\s\"'`)]+", text)) <= {"http://www.w3.org/2000/svg"}, file.name
        assert "innerHTML" not in text
        assert not re.search(r"\son\w+=|style=|javascript:", text), "inline code or style would be refused"


def test_cards_follow_the_rights_of_the_key(place):
    async def conversation(client):
        async def card(model, key):
            return await client.get(f"/playground/api/card?model={model}", headers=bearer(key))

        mine, base = await card("red", "key-acme"), await card(BASE_ID, "key-other")
        foreign = [await card(m, "key-acme") for m in ("blue", BASE_ID, "nobody")]
        roles = [(await card("red", key)).status_code for key in ("boss", "eye", "wrong")]
        return mine.json(), base.json(), [r.status_code for r in foreign], roles

    gateway = keyed(place)
    digest = gateway.store.resolve("red").digest
    mine, base, foreign, roles = talk(gateway, conversation)
    adapter = read_adapter(place / "adapters" / "red")
    assert (mine["model"], mine["digest"], mine["ranks"], mine["scalings"]) == ("red@1", digest, [4], [2.0])
    assert (mine["params"], mine["bytes"]) == (adapter.num_params, adapter.num_bytes)
    assert sum(t["modules"] for t in mine["targets"]) == len(adapter.factors)
    assert (base["digest"], base["fingerprint"]) == (None, gateway.base_fingerprint)
    assert foreign == [404] * 3
    assert roles == [401] * 3


@pytest.mark.parametrize(
    "provenance",
    [
        {"run": [1], "base": "text", "versions": None},
        {"run": {"train": {"lr": {"a": 1}, "seed": [1], "epochs": "x" * 9999}}, "base": {"name": {"a": 1}}},
        {"base": {"fingerprint": "text"}},
        {"base": {"fingerprint": [1]}},
        {"base": [1]},
    ],
)
def test_whatever_a_sidecar_says_is_a_card_or_a_refusal(place, tmp_path, provenance):
    adapter = read_adapter(place / "adapters" / "red")
    adapter.provenance = provenance
    write_adapter(adapter, tmp_path / "odd")
    store = Store(tmp_path / "store")
    card = store.card(store.add("odd", tmp_path / "odd").digest)
    plain = (str, int, float)
    assert all(isinstance(v, plain) and len(str(v)) <= 200 for v in card["run"].values())
    assert card["base_name"] is None or isinstance(card["base_name"], str)
    store.close()


def test_live_figures_are_ones_own(place):
    gateway = keyed(place, max_rows=2)

    async def conversation(client):
        async def live(key):
            return (await client.get("/playground/api/live", headers=bearer(key))).json()

        running = [
            asyncio.ensure_future(
                chat(client, "red", max_tokens=300, ignore_eos=True, headers=bearer("key-acme"))
            )
            for _ in range(6)
        ]
        while gateway.queue.running_rows + gateway.queue.waiting < 6:
            await asyncio.sleep(0.001)
        during = await live("key-acme"), await live("key-other")
        await asyncio.gather(*running)
        return *during, await live("key-acme"), await live("key-other")

    during, other_during, after, other_after = talk(gateway, conversation)
    assert during["running_rows"] + during["waiting"] == 6
    assert after["generated_tokens"] == 6 * 300
    assert after["requests"] == 6
    for foreign in (other_during, other_after):
        assert (foreign["running_rows"], foreign["waiting"], foreign["generated_tokens"]) == (0, 0, 0)
        assert not {"loaded_adapters", "isolation_mismatches", "why_not"} & set(foreign)


def test_without_keys_the_page_sees_the_servers_state(place):
    gateway = make_gateway(place)

    async def conversation(client):
        await chat(client, "red")
        ready = (await client.get("/playground/api/live")).json()
        gateway.mismatches = 1
        return ready, (await client.get("/playground/api/live")).json()

    ready, broken = talk(gateway, conversation)
    assert (ready["ready"], ready["loaded_adapters"], ready["isolation_mismatches"]) == (True, 1, 0)
    assert (broken["ready"], broken["isolation_mismatches"]) == (False, 1)
    assert "differ when computed alone" in broken["why_not"]
