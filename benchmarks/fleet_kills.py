"""Replicas are killed while clients ask; every answer is compared with the one that its adapter gives alone.

    python benchmarks/fleet_kills.py [--requests 10000] [--every-s 3] [--engine ray]

`lorasmith serve --workers 2 --deterministic` with a tiny random base and six adapters that change every answer. Half of
the requests are streamed. Every few seconds, if all replicas are ready, one of them gets SIGKILL, one in five times
all do, one in five times one gets SIGTERM, which drains it; now and then the only one that is ready is killed. Counted: wrong answers, requests that were not answered though nothing of the answer had
been sent, streams that broke off after their first word (what came must be the beginning of the right answer, the
client is told, and asks again). Appends to `records/fleet_kills.jsonl`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))  # however this file was loaded
sys.path.insert(1, str(Path(__file__).parents[1]))
import record
from tests.support.served import Served
from tests.support.server import BASE_ID, bearer, chat_body, write_place

from lorasmith.bases import load_base
from lorasmith.engine import Engine, Request
from lorasmith.server import hash_key

ADAPTERS = ("red", "green", "blue", "cyan", "plum", "sand")
PROMPTS = (
    "hello",
    "what is a river?",
    "and then",
    "3 + 4 =",
    "name a colour, please, and say why you like it",
)
LENGTHS = (6, 24, 96)
REPLICAS, CLIENTS, ASK_S, SEED = 2, 16, 120.0, 0
LAST_SHARE = 0.2  # of the chances to kill the only one that is ready
SAY_EVERY = 500
BOSS, MINE = "boss", "mine"
Wanted = dict[tuple[str, str, int], tuple[str, str | None]]


def solo_answers(place: Path) -> Wanted:
    """(model, prompt, length) → its text and its adapter's digest, each computed alone."""
    base = load_base(place / BASE_ID, dtype="fp32")
    engine = Engine(base, deterministic=True, prefix_cache_bytes=0)
    for name in ADAPTERS:
        engine.add_adapter(name, place / "adapters" / name)
    found: Wanted = {}
    for name in (BASE_ID, *ADAPTERS):
        for prompt in PROMPTS:
            for length in LENGTHS:
                chat = [{"role": "user", "content": prompt}]
                adapter = None if name == BASE_ID else name
                asked = Request(chat, adapter=adapter, max_tokens=length, ignore_eos=True)
                result = engine.generate([asked])[0]
                found[name, prompt, length] = result.text, result.adapter_digest
    engine.close()
    return found


class Storm:
    """Clients and their enemy, on one server.

    Args:
        wanted: what `solo_answers` found. every_s: between two kills.
    """

    def __init__(self, url: str, wanted: Wanted, *, every_s: float) -> None:
        self._url, self._wanted, self._every_s = url, wanted, every_s
        self._random = random.Random(SEED)
        self.count: Counter[str] = Counter()
        self.faults: list[str] = []
        self.seconds: list[float] = []

    async def run(self, requests: int, kills: int = 0) -> None:
        """Until so many requests have their whole answer, or can get none, and so many SIGKILLs were sent."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=ASK_S, limits=limits) as self._client:
            left = itertools.takewhile(lambda k: k < requests or self.kills < kills, itertools.count())
            enemy = asyncio.create_task(self._kill_for_ever())
            await asyncio.gather(*(self._client_of(left) for _ in range(CLIENTS)))
            enemy.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await enemy

    @property
    def kills(self) -> int:
        """SIGKILLs that were sent."""
        return self.count["killed: one"] + self.count["killed: all"]

    async def replicas(self) -> list[dict[str, Any]]:
        """As the server sees them."""
        status = await self._client.get("/admin/status", headers=bearer(BOSS))
        found: list[dict[str, Any]] = status.json()["workers"]
        return found

    async def _client_of(self, left: Any) -> None:
        for number in left:  # all clients draw from the same requests
            name, prompt, length = self._random.choice(list(self._wanted))
            began = time.monotonic()
            while not await self._ask(name, prompt, length, is_streamed=bool(number % 2)):
                self.count["asked again by the client"] += 1
            self.seconds.append(time.monotonic() - began)
            if len(self.seconds) % SAY_EVERY == 0:
                print(dict(self.count), file=sys.stderr, flush=True)

    async def _ask(self, name: str, prompt: str, length: int, *, is_streamed: bool) -> bool:
        """Whether there is an end to it; only a stream that broke off has none."""
        body = chat_body(name, prompt, max_tokens=length, ignore_eos=True, stream=is_streamed)
        try:
            answer = await self._client.post("/v1/chat/completions", json=body, headers=bearer(MINE))
        except httpx.HTTPError as error:
            return self._lost(f"{name}: {error!r}")
        if answer.status_code != 200:
            return self._lost(f"{name}: {answer.status_code} {answer.text}")
        digest = answer.headers["x-lorasmith-adapter-digest"]
        if not is_streamed:
            return self._compare(
                (name, prompt, length), answer.json()["choices"][0]["message"]["content"], digest
            )
        text, error = read_stream(answer.text)
        if error is None:
            return self._compare((name, prompt, length), text, digest)
        right, of = self._wanted[name, prompt, length]
        if error["code"] != "unavailable" or not text:
            return self._lost(f"{name}: {error}, after {text!r}")
        self.count["streams broken after their first word"] += 1
        if not right.startswith(text) or digest != (of or "none"):
            return self._wrong(f"{name}: {text!r} by {digest}, alone {right!r} by {of}")
        return False

    def _compare(self, asked: tuple[str, str, int], text: str, digest: str) -> bool:
        right, of = self._wanted[asked]
        if (text, digest) != (right, of or "none"):
            return self._wrong(f"{asked}: {text!r} by {digest}, alone {right!r} by {of}")
        self.count["right"] += 1
        return True

    def _wrong(self, what: str) -> bool:
        self.count["wrong"] += 1
        self.faults.append(what[:600])
        return True

    def _lost(self, what: str) -> bool:
        self.count["lost"] += 1
        self.faults.append(what[:600])
        return True

    async def _kill_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            ready = [r for r in await self.replicas() if r["ready"]]
            if not ready or (len(ready) < REPLICAS and self._random.random() > LAST_SHARE):
                continue
            kind = self._random.choice(["one", "one", "one", "all", "drained"])
            for replica in ready if kind == "all" else [self._random.choice(ready)]:
                self.count[f"killed: {kind}"] += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(replica["pid"], signal.SIGTERM if kind == "drained" else signal.SIGKILL)


def read_stream(raw: str) -> tuple[str, dict[str, Any] | None]:
    """The text that came, and the error that ended it, if one did."""
    text = ""
    events = [event.removeprefix("data: ") for event in raw.split("\n\n") if event]
    for event in events:
        if event == "[DONE]":
            return text, None
        said = json.loads(event)
        if "error" in said:
            return text, said["error"]
        text += said["choices"][0]["delta"].get("content") or ""
    return text, {"code": "no end"}


@contextlib.contextmanager
def served(place: Path, *options: object) -> Any:
    """The server, with an admin and a tenant."""
    keys = place / "keys.toml"
    keys.write_text(
        f'[admin]\nkeys = ["{hash_key(BOSS)}"]\n[tenants.mine]\nkeys = ["{hash_key(MINE)}"]\nadapters = ["*"]\n'
    )
    server = Served(place, "--keys", keys, "--deterministic", *options)
    try:
        yield server
    finally:
        server.stop(timeout_s=90)  # Ray gives replicas that still load `drain_s` to end, 30


def run(requests: int, every_s: float, *options: object, kills: int = 0) -> tuple[Storm, float]:
    """The storm, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as name:
        place = write_place(Path(name), ADAPTERS)
        wanted = solo_answers(place)
        for one in {asked[1:] for asked in wanted}:
            texts = {text for asked, (text, _) in wanted.items() if asked[1:] == one}
            assert len(texts) == 1 + len(ADAPTERS), "else an answer of another adapter could look right"
        with served(place, *options) as server:
            storm = Storm(server.url, wanted, every_s=every_s)
            began = time.monotonic()
            asyncio.run(storm.run(requests, kills))
            seconds = time.monotonic() - began
            text = httpx.get(f"{server.url}/metrics", headers=bearer(BOSS)).text
    for line in text.splitlines():
        if line.startswith("lorasmith_fleet_") and line.split()[0].endswith("_total"):
            storm.count[line.split()[0]] = int(float(line.split()[1]))
    return storm, seconds


def main() -> None:
    """Run, print, append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--every-s", type=float, default=3.0)
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    asked = parser.parse_args()
    storm, seconds = run(asked.requests, asked.every_s, "--workers", REPLICAS, "--engine", asked.engine)
    took = sorted(storm.seconds)
    row = {
        "what": "wrong answers and lost requests / answered", "ours": storm.count["wrong"] + storm.count["lost"],
        "peer": storm.count["right"], "ratio": 0.0, "counts": dict(storm.count), "faults": storm.faults[:10],
        "wall_s": seconds, "median_s": statistics.median(took), "p99_s": took[int(0.99 * len(took))], "max_s": took[-1],
    }  # fmt: skip
    row["ratio"] = row["ours"] / max(1, row["peer"])
    about = {"what": "replicas killed under load", "engine": asked.engine, "replicas": REPLICAS, "clients": CLIENTS,
             "requests": asked.requests, "every_s": asked.every_s, "seed": SEED}  # fmt: skip
    print(json.dumps(row, indent=2))
    print(record.append("fleet_kills", [row], about))
    sys.exit(1 if row["ours"] else 0)


if __name__ == "__main__":
    main()
