"""`lorasmith serve --engine ray`: a local Ray with two replicas, of which some are killed. `make test-ray`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
import time
from collections import Counter

import httpx
import psutil
import pytest

from lorasmith.server.run import free_port
from tests.support.server import BASE_ID, NAMES, bearer, chat_body, events, streamed_text, write_place
from tests.support.storm import load_storm

pytest.importorskip(
    "ray", reason="the extra [ray] is not installed; make test-ray has an environment with it"
)
pytestmark = pytest.mark.ray
BOSS, MINE = bearer("boss"), bearer("mine")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("place"), context=16_384)
    with load_storm().served(place, "--workers", 2, "--engine", "ray") as server:
        yield server
    assert server.process.returncode == 0, "".join(server.lines)[-3000:]


def ask(served, model, **settings):
    body = chat_body(model, **settings)
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=MINE, timeout=60)


def replicas(served):
    return httpx.get(f"{served.url}/admin/status", headers=BOSS).json()["workers"]


def until_both_are_ready(served):
    deadline = time.monotonic() + 90
    while sum(r["ready"] for r in replicas(served)) < 2:
        assert time.monotonic() < deadline, replicas(served)
        time.sleep(0.2)


def busy_one(served):
    deadline = time.monotonic() + 20
    while not (busy := [r for r in replicas(served) if r["rows"]]):
        assert time.monotonic() < deadline, "a request runs, and no replica has it"
        time.sleep(0.05)
    return busy[0]


def homes(served):
    """Adapter → the replicas that answered for it."""
    text = httpx.get(f"{served.url}/metrics", headers=BOSS).text
    found = {}
    for line in text.splitlines():
        if line.startswith('lorasmith_requests_total{adapter="'):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            found.setdefault(labels["adapter"], set()).add(labels["worker"])
    return found


def test_an_adapter_has_a_home_and_every_answer_is_its_own(served):
    until_both_are_ready(served)
    alone = {}
    for model in (BASE_ID, *NAMES):
        whole, stream = ask(served, model), ask(served, model, stream=True)
        assert whole.status_code == 200, whole.text
        alone[model] = whole.json()["choices"][0]["message"]["content"]
        assert streamed_text(events(stream)) == alone[model]
        digest = whole.json()["lorasmith"]["adapter_digest"] or "none"
        assert whole.headers["x-lorasmith-adapter-digest"] == digest
        assert "," not in whole.headers["x-request-id"]
    assert len(set(alone.values())) == 4
    time.sleep(1.0)  # the ingress asks the replicas for their figures twice a second
    found = homes(served)
    assert set(found) == {BASE_ID, *NAMES}
    assert all(len(where) == 1 for where in found.values()), "one request at a time never leaves its home"


def test_keys_and_names_are_the_ingress_s_business(served):
    address = f"{served.url}/v1/chat/completions"
    assert httpx.post(address, json=chat_body("red")).status_code == 401
    assert ask(served, "nobody").status_code == 404
    forged = MINE | {"x-lorasmith-asked": '{"tenant": {"name": "a"}, "resolved": {}}'}
    assert httpx.post(address, json=chat_body("red"), headers=forged).status_code == 200
    assert ask(served, "red", max_tokens=20_000).json()["error"]["code"] == "context_length_exceeded"
    alias = {"alias": "mine", "model": "green"}
    assert httpx.post(f"{served.url}/admin/alias", json=alias, headers=BOSS).status_code == 200
    assert ask(served, "mine").headers["x-lorasmith-model"] == "green@1"


def test_a_stream_that_breaks_off_says_so_and_a_client_that_leaves_frees_its_row(served):
    until_both_are_ready(served)
    body = chat_body("green", max_tokens=15_000, ignore_eos=True, stream=True)
    address = f"{served.url}/v1/chat/completions"
    with httpx.Client(timeout=120) as client:
        with client.stream("POST", address, json=body, headers=MINE) as stream:
            pieces = stream.iter_text()
            next(pieces)
            busy_one(served)
        deadline = time.monotonic() + 20
        while any(r["rows"] for r in replicas(served)):
            assert time.monotonic() < deadline, "nobody reads it any more"
            time.sleep(0.1)
        with client.stream("POST", address, json=body, headers=MINE) as stream:
            pieces = stream.iter_text()
            text = next(pieces)
            killed = busy_one(served)
            os.kill(killed["pid"], signal.SIGKILL)
            text += "".join(pieces)
    assert json.loads(text.rstrip().rsplit("data: ", 1)[1])["error"]["code"] == "unavailable"
    while any(r["pid"] == killed["pid"] for r in replicas(served)):
        time.sleep(0.1)
    until_both_are_ready(served)


def flood(served, count, until, timeout_s=90.0):
    """Ask for `red` many times at once until the replicas are as `until` wants them."""
    body = chat_body("red", max_tokens=15_000, ignore_eos=True)

    async def run():
        async with httpx.AsyncClient(base_url=served.url, timeout=300) as client:
            tasks = [
                asyncio.ensure_future(client.post("/v1/chat/completions", json=body, headers=MINE))
                for _ in range(count)
            ]
            deadline = time.monotonic() + timeout_s
            while not until(found := (await client.get("/admin/status", headers=BOSS)).json()["workers"]):
                assert time.monotonic() < deadline, found
                await asyncio.sleep(0.2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_a_hot_adapter_runs_on_both(served):
    until_both_are_ready(served)
    flood(served, 10, lambda found: sum(r["rows"] > 0 for r in found) == 2)


def test_the_queue_brings_another_replica(tmp_path):
    place = write_place(tmp_path, context=16_384)
    options = ("--workers", 1, "--max-workers", 2, "--engine", "ray")
    with load_storm().served(place, *options) as server:
        assert len(replicas(server)) == 1
        flood(server, 14, lambda found: sum(r["ready"] for r in found) == 2)


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_changed_configuration_is_rolled_out_and_no_request_is_lost(tmp_path):
    """As `serve deploy` does it: the ingress is replaced too."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from lorasmith.server.on_ray import application

    place, port = write_place(tmp_path), free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    settings = {"base": str(place / BASE_ID), "store": str(place / "store"), "dtype": "fp32", "workers": 2}
    others = replica_pids()  # of the other tests' server
    codes, texts, is_over = Counter(), Counter(), threading.Event()

    def ask_on():
        with httpx.Client(base_url=url, timeout=60) as client:
            while not is_over.is_set():
                answer = client.post("/v1/chat/completions", json=chat_body("red"))
                codes[answer.status_code] += 1
                if answer.status_code == 200:
                    texts[answer.json()["choices"][0]["message"]["content"]] += 1

    ray.init(num_cpus=4, include_dashboard=False)
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        pids = []
        for max_rows in (4, 6):
            serve.run(
                application(settings | {"options": {"max_rows": max_rows, "deterministic": True}}),
                name="lorasmith", route_prefix="/",
            )  # fmt: skip
            if not pids:
                while httpx.get(f"{url}/ready").status_code != 200:
                    time.sleep(0.2)
                clients = [threading.Thread(target=ask_on) for _ in range(4)]
                for client in clients:
                    client.start()
            time.sleep(2)
            pids.append(replica_pids() - others)
        is_over.set()
        for client in clients:
            client.join()
    finally:
        is_over.set()
        serve.shutdown()
        ray.shutdown()
    assert [len(found) for found in pids] == [2, 2]
    assert not pids[0] & pids[1], "every replica was replaced"
    assert set(codes) == {200}
    assert codes[200] > 50
    assert len(texts) == 1


def replica_pids():
    """Processes of this machine that are an engine's replica."""
    lines = {p.pid: "".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])}
    return {pid for pid, line in lines.items() if "ServeReplica:lorasmith:Replica" in line}


def test_no_answer_is_wrong_and_none_is_lost_while_replicas_are_killed():
    storm, _ = load_storm().run(300, 3.0, "--workers", 2, "--engine", "ray", kills=1)
    assert storm.faults == []
    assert storm.count["right"] >= 300
    assert (storm.count["wrong"], storm.count["lost"]) == (0, 0)
    assert storm.kills >= 1
