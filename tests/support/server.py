"""A gateway over a tiny base and a store of strong adapters, and a client that speaks to it in process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from lorasmith.bases import load_base
from lorasmith.engine import Engine
from lorasmith.formats import write_adapter
from lorasmith.inject import eject, extract, inject
from lorasmith.lora import LoRAConfig
from lorasmith.server import Gateway, Keys, ServerConfig, create_app, hash_key
from lorasmith.server.keys import Principal, Tenant
from lorasmith.store import Store
from tests.support.base import write_tiny_base
from tests.support.models import randomise

NAMES = ("red", "green", "blue")
BASE_ID = "tiny"


def write_place(folder: Path, names: Sequence[str] = NAMES, *, context: int = 512) -> Path:
    """A base and a store with an adapter for each name, strong enough to change every answer."""
    write_tiny_base(folder / BASE_ID, max_position_embeddings=context)
    base = load_base(folder / BASE_ID, dtype="fp32")
    store = Store(folder / "store")
    for seed, name in enumerate(names):
        write_strong(base.model, folder / "adapters" / name, seed)
        store.add(name, folder / "adapters" / name)
    store.close()
    return folder


def write_strong(model: Any, path: Path, seed: int, rank: int = 4) -> Path:
    inject(model, LoRAConfig(rank=rank, alpha=2 * rank), seed=seed)
    adapter = randomise(extract(model), seed=seed, size=0.5)
    eject(model)
    write_adapter(adapter, path)
    return path


def make_gateway(
    place: Path,
    *,
    keys: Keys | None = None,
    max_rows: int = 4,
    engine: dict[str, Any] | None = None,
    reference: bool = False,
    **config: Any,
) -> Gateway:
    base = load_base(place / BASE_ID, dtype="fp32")
    options = {"max_rows": max_rows, "deterministic": reference, **(engine or {})}
    other = Engine(base, **{**options, "prefix_cache_bytes": 0}) if reference else None
    return Gateway(
        base,
        Engine(base, **options),
        Store(place / "store"),
        ServerConfig(BASE_ID, **config),
        keys=keys,
        reference=other,
    )


def make_keys(*tenants: Tenant, admin: str | None = None, monitor: str | None = None) -> Keys:
    """Each tenant's key is `key-<name>`."""
    known = {hash_key(f"key-{t.name}"): Principal("tenant", t) for t in tenants}
    for role, token in (("admin", admin), ("monitor", monitor)):
        if token:
            known[hash_key(token)] = Principal(role)  # type: ignore[arg-type]
    return Keys(known)


def talk(gateway: Gateway, conversation: Callable[[httpx.AsyncClient], Awaitable[Any]], **app: Any) -> Any:
    """Run a conversation with the application, started and closed around it."""

    async def run() -> Any:
        await gateway.start()
        transport = httpx.ASGITransport(create_app(gateway, **app))  # type: ignore[arg-type]
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await conversation(client)
        finally:
            await gateway.close()

    return asyncio.run(run())


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def chat_body(model: str, text: str = "hello", **settings: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 8} | settings


async def chat(client: httpx.AsyncClient, model: str, text: str = "hello", **settings: Any) -> httpx.Response:
    headers = settings.pop("headers", {})
    return await client.post("/v1/chat/completions", json=chat_body(model, text, **settings), headers=headers)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a streamed answer; the end mark must be there."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def streamed_text(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content") or "" if "delta" in c else c["text"] for c in choices)
