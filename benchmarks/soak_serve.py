"""Soak: a server under mixed load while adapters come and go; every greedy answer is compared with its solo answer.

    python benchmarks/soak_serve.py [--minutes 20] [--cycles 10000]

The built-in base in deterministic mode, with a share of shadow runs. Clients ask (some stream, some hang up in
the middle), send prompts that are too long, bodies that are no JSON and names that do not exist; one tenant
loads and unloads adapters without pause; one uploads adapters that are damaged. Counted: wrong answers, answers
of another adapter, unexpected statuses, requests that hung, resident memory. Appends to `records/soak.jsonl`.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent))  # however this file was loaded
import record

from lorasmith.bases import load_base
from lorasmith.engine import Engine, Request
from lorasmith.formats import write_adapter
from lorasmith.inject import eject, extract, inject
from lorasmith.lora import LoRAConfig

BASE, SEED, RANK, TOKENS = "smollm2-135m", 0, 2, 8
STABLE, CYCLED = 8, 16
PROMPTS = ("Tell me a story.", "What is a river?", "Name a colour, please, and say why you like it.")
HANG_S = 120.0
CLIENTS, CYCLERS = 10, 2
ABOUT = {"what": "soak of the server", "base": BASE, "rank": RANK, "seed": SEED, "tokens": TOKENS}


def make_adapters(base: Any, folder: Path) -> dict[str, Any]:
    """Name → adapter, written to `folder`, each strong enough to change answers."""
    made = {}
    for number in range(STABLE + CYCLED):
        inject(base.model, LoRAConfig(rank=RANK, targets=["q_proj", "v_proj", "down_proj"]), seed=number)
        adapter = extract(base.model)
        eject(base.model)
        generator = torch.Generator().manual_seed(number)
        for f in adapter.factors.values():
            f.B = torch.randn(f.B.shape, generator=generator) * 0.3
        name = f"{'stable' if number < STABLE else 'cycled'}-{number}"
        write_adapter(adapter, folder / name)
        made[name] = adapter
    return made


def solo_answers(base: Any, adapters: dict[str, Any]) -> dict[tuple[str, str], tuple[str, str | None]]:
    """(model, prompt) → its text and digest, each generated alone."""
    engine = Engine(base, deterministic=True, prefix_cache_bytes=0)
    answers = {}
    for name, adapter in [(BASE, None), *adapters.items()]:
        if adapter is not None:
            engine.add_adapter(name, adapter)
        for prompt in PROMPTS:
            chat = [{"role": "user", "content": prompt}]
            asked = Request(chat, adapter=None if adapter is None else name, max_tokens=TOKENS)
            result = engine.generate([asked])[0]
            answers[name, prompt] = result.text, result.adapter_digest
    engine.close()
    return answers


def start(folder: Path, names: list[str]) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-c", "from lorasmith.cli import main; main()", "serve", "--base", BASE]
    command += ["--store", str(folder / "store"), "--port", "0", "--shadow-share", "0.02"]
    for name in names:
        command += ["--adapters", f"{name}={folder / name}"]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, stderr=log, stdout=log, text=True)
    while not (found := re.search(r"serving on (\S+)/v1", (folder / "log").read_text())):
        if process.poll() is not None:
            raise SystemExit((folder / "log").read_text())
        time.sleep(0.2)
    return process, found[1]


class Soak:
    def __init__(self, url: str, pid: int, answers: dict[Any, Any], bad: Path, until: float) -> None:
        self.client = httpx.AsyncClient(base_url=url, timeout=HANG_S, limits=httpx.Limits(max_connections=64))
        self.process, self.answers, self.bad, self.until = psutil.Process(pid), answers, bad, until
        self.names = sorted({name for name, _ in answers})
        self.random = random.Random(SEED)
        self.count: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.memory: list[int] = []

    def fault(self, what: str) -> None:
        self.count["faults"] += 1
        self.faults.append(what[:300])

    async def run(self, cycles: int) -> None:
        tasks = [self._forever(self.ask) for _ in range(CLIENTS)]
        tasks += [self._forever(self.cycle, cycles // CYCLERS) for _ in range(CYCLERS)]
        tasks += [self._forever(self.upload_damaged), self._forever(self.watch)]
        await asyncio.gather(*tasks)
        await self.client.aclose()

    async def _forever(self, once: Callable[[], Awaitable[None]], times: int = sys.maxsize) -> None:
        while time.monotonic() < self.until and times:
            times -= 1
            try:
                await once()
            except httpx.TimeoutException as error:
                self.fault(f"hung: {error!r}")
            except httpx.HTTPError as error:
                self.fault(f"connection: {error!r}")
                await asyncio.sleep(0.5)

    async def ask(self) -> None:
        kind = self.random.choices(
            ["plain", "stream", "hang up", "too long", "no json", "unknown"], [40, 40, 10, 4, 3, 3]
        )[0]
        name, prompt = self.random.choice(self.names), self.random.choice(PROMPTS)
        body = {"model": name, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
                "max_tokens": TOKENS}  # fmt: skip
        self.count[kind] += 1
        if kind in ("stream", "hang up"):
            await self._stream({**body, "stream": True}, name, prompt, hang_up=kind == "hang up")
        elif kind == "plain":
            answer = await self.client.post("/v1/chat/completions", json=body)
            if self._is_served(answer, name):
                said = answer.json()
                digest = said["lorasmith"]["adapter_digest"]
                self._compare(name, prompt, said["choices"][0]["message"]["content"], digest)
        else:
            await self._refused(kind, body)

    async def _stream(self, body: dict[str, Any], name: str, prompt: str, *, hang_up: bool) -> None:
        pieces: list[str] = []
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
            if not self._is_served(answer, name):
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self.fault(f"stream of {name}: {event['error']}")
                        return
                    pieces += [c["delta"].get("content") or "" for c in event["choices"]]
                    if hang_up and pieces:
                        return
        digest = answer.headers.get("x-lorasmith-adapter-digest")
        self._compare(name, prompt, "".join(pieces), digest)

    def _is_served(self, answer: httpx.Response, name: str) -> bool:
        if answer.status_code == 200:
            return True
        if answer.status_code == 404 and name.startswith("cycled"):
            self.count["unloaded at that moment"] += 1
        elif answer.status_code == 429:
            self.count["asked to wait"] += 1
        else:
            self.fault(f"{name}: {answer.status_code} {answer.text}")
        return False

    def _compare(self, name: str, prompt: str, text: str, digest: str | None) -> None:
        wanted, of = self.answers[name, prompt]
        self.count["compared"] += 1
        if (text, digest or None) != (wanted, of):
            self.count["wrong"] += 1
            self.fault(f"{name}, {prompt!r}: {text!r} by {digest}, alone {wanted!r} by {of}")

    async def _refused(self, kind: str, body: dict[str, Any]) -> None:
        if kind == "too long":
            body["messages"][0]["content"] = "word " * self.random.choice([9_000, 60_000])
        if kind == "unknown":
            body["model"] = self.random.choice(["nobody", "../store", "stable-0@99", "0" * 64])
        content = b'{"model": ' if kind == "no json" else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        answer = await self.client.post("/v1/chat/completions", content=content, headers=headers)
        wanted = {"too long": (400, 413), "no json": (400, 422), "unknown": (404,)}[kind]
        if answer.status_code not in wanted:
            self.fault(f"{kind}: {answer.status_code} {answer.text}")

    async def cycle(self) -> None:
        name = self.random.choice([n for n in self.names if n.startswith("cycled")])
        for verb in ("unload", "load"):
            answer = await self.client.post(f"/admin/{verb}", json={"model": name})
            if answer.status_code != 200 and (verb, answer.status_code) != (
                "load",
                404,
            ):  # another one unloaded it
                self.fault(f"{verb} {name}: {answer.status_code} {answer.text}")
        self.count["load and unload cycles"] += 1

    async def upload_damaged(self) -> None:
        begun = await self.client.post("/admin/uploads")
        if begun.status_code != 200:
            self.fault(f"begin an upload: {begun.status_code} {begun.text}")
            return
        upload = begun.json()["upload"]
        whole = self.random.choice([n for n in self.names if n != BASE])
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            content = bytearray((self.bad / whole / file).read_bytes())
            if file.endswith("safetensors"):
                place = self.random.choice([0, 8, 200, len(content) // 2])
                content[place : place + 8] = b"\xff\xff\xff\x7f\xff\xff\xff\x7f"
                content = content[: self.random.choice([len(content), len(content) - 100, 4])]
            await self.client.put(f"/admin/uploads/{upload}/{file}", content=bytes(content))
        answer = await self.client.post("/admin/adapters", json={"name": "damaged", "upload": upload})
        self.count["damaged uploads"] += 1
        if answer.status_code == 200:  # eight bytes in the middle may be numbers like any other
            self.count["damaged, yet an adapter"] += 1
            await self.client.post("/admin/remove", json={"model": "damaged", "drop_aliases": True})
        elif answer.status_code not in (400, 409, 422):
            self.fault(f"damaged upload: {answer.status_code} {answer.text}")
        await asyncio.sleep(0.5)

    async def watch(self) -> None:
        await asyncio.sleep(5)
        self.memory.append(self.process.memory_info().rss)
        ready = await self.client.get("/ready")
        if ready.status_code != 200:
            self.fault(f"not ready: {ready.text}")

    def row(self, mismatches: int) -> dict[str, Any]:
        settled = self.memory[len(self.memory) // 4 :] or [0]
        part = max(1, len(settled) // 4)
        first, last = max(settled[:part]), max(settled[-part:])
        return {
            "what": "wrong answers / compared", "ours": self.count["wrong"], "peer": self.count["compared"],
            "ratio": self.count["wrong"] / max(1, self.count["compared"]),
            "counts": dict(self.count), "isolation_mismatches": mismatches, "faults": self.faults[:20],
            "rss_after_a_quarter": first, "rss_at_the_end": last,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--cycles", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = load_base(BASE)
        adapters = make_adapters(base, folder)
        answers = solo_answers(base, adapters)
        process, url = start(folder, list(adapters))
        try:
            soak = Soak(url, process.pid, answers, folder, time.monotonic() + 60 * options.minutes)
            asyncio.run(soak.run(options.cycles))
            metrics = httpx.get(f"{url}/metrics").text
        finally:
            process.terminate()
            code = process.wait(60)
        said = re.search(r"^\S*isolation_mismatch_total\S* (\S+)", metrics, re.M)
        row = soak.row(int(float(said[1])) if said else -1) | {"exit": code, "minutes": options.minutes}
    path = record.append("soak", [row], {**ABOUT, "pid": os.getpid()})
    print(json.dumps(row, indent=2))
    print(f"recorded in {path}")
    raise SystemExit(1 if row["counts"].get("faults") or row["isolation_mismatches"] else 0)


if __name__ == "__main__":
    main()
