"""Our server over a real socket, and builds of it that are broken in one way each."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.responses import JSONResponse

from lorasmith.analysis import combine
from lorasmith.bases import load_base
from lorasmith.engine import engine as engine_module
from lorasmith.errors import AdapterFileError, LoraSmithError, UnknownAdapterError
from lorasmith.formats import read_adapter
from lorasmith.server import Gateway, create_app
from lorasmith.server.admin import facts_of
from lorasmith.server.names import Resolved
from tests.support.base import write_tiny_base
from tests.support.server import BASE_ID, make_gateway, make_keys

ADMIN = "boss"
Break = Callable[["Running", Any], Any]


class NoLease:
    """For adapters that are not in the store."""

    def release(self) -> None:
        """Nothing to give back."""


class Running:
    """A gateway, its application and the uvicorn server around them, in a thread."""

    def __init__(self, gateway: Gateway, patch: Any, fault: Break | None) -> None:
        self.gateway, self.patch = gateway, patch
        self.app: Any = create_app(gateway)
        if fault is not None:
            self.app = fault(self, patch) or self.app
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(self.app, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(20)
        self.socket.close()


def write_anisotropic_base(folder: Path) -> Path:
    """A tiny base whose hidden states have a common part, as those of trained models do."""
    path = write_tiny_base(folder, hidden_size=64, intermediate_size=96, max_position_embeddings=1024)
    base = load_base(path, dtype="fp32")
    with torch.no_grad():
        base.model.get_input_embeddings().weight += 0.3
    base.model.save_pretrained(path)
    return path


@contextlib.contextmanager
def serving(place: Path, patch: Any, fault: Break | None = None, **config: Any) -> Iterator[Running]:
    """A server with an admin, of the base in `place`, with a new store."""
    gateway = make_gateway(place, keys=make_keys(admin=ADMIN), max_rows=4, **config)
    with Running(gateway, patch, fault) as running:
        yield running


def swaps_two_adapters(running: Running, patch: Any) -> None:
    """amber gets cobalt, and the other way round."""
    resolve, store = running.gateway.adapters.resolve, running.gateway.store

    def wrong(model: str, *arguments: Any, **named: Any) -> Resolved:
        for one, other in (("amber", "cobalt"), ("cobalt", "amber")):
            for alias in [a.alias for a in store.aliases()] if one in model else ():
                if other in alias:
                    return resolve(alias, *arguments, **named)
        return resolve(model, *arguments, **named)

    patch.setattr(running.gateway.adapters, "resolve", wrong)


def first_of_a_batch_wins(running: Running, patch: Any) -> None:
    """Whoever comes while another adapter runs gets that adapter."""
    gateway = running.gateway
    submit, rows = gateway.engine.submit, gateway.engine.scheduler.rows
    patch.setattr(gateway, "_refuse_failed", lambda *_: None)  # our own server would notice

    def wrong(request: Any, *arguments: Any) -> Any:
        busy = [row.request.adapter for row in [*rows] if row.request.adapter]
        if request.adapter and busy:
            with contextlib.suppress(UnknownAdapterError):
                return submit(replace(request, adapter=busy[0]), *arguments)
        return submit(request, *arguments)

    patch.setattr(gateway.engine, "submit", wrong)


def cache_without_adapter(_: Running, patch: Any) -> None:
    """Keys and values are reused by tokens alone (transformers' continuous batching; llama.cpp#26207)."""
    owner = engine_module.Owner
    patch.setattr(engine_module, "Owner", lambda base, digest, tenant: owner(base, None, tenant))


def cache_by_name(running: Running, patch: Any) -> None:
    """They are reused by the adapter's name, which may mean other weights by now (vllm#42125)."""
    owner, adapters = engine_module.Owner, running.gateway.adapters
    resolve, names = adapters.resolve, dict[str, str]()

    def noting(model: str, *arguments: Any, **named: Any) -> Resolved:
        resolved = resolve(model, *arguments, **named)
        if resolved.digest:
            names[resolved.digest] = resolved.name
        return resolved

    patch.setattr(adapters, "resolve", noting)
    patch.setattr(engine_module, "Owner", lambda b, digest, tenant: owner(b, names.get(digest), tenant))


def unknown_means_base(running: Running, patch: Any) -> None:
    """TGI#2505."""
    resolve = running.gateway.adapters.resolve

    def kind(*arguments: Any, **named: Any) -> Resolved:
        try:
            return resolve(*arguments, **named)
        except UnknownAdapterError:
            return Resolved(BASE_ID, BASE_ID, None, None)

    patch.setattr(running.gateway.adapters, "resolve", kind)


def base_means_all(running: Running, patch: Any) -> None:
    """llama.cpp's default: every adapter applies where none is named."""
    gateway = running.gateway
    resolve = gateway.adapters.resolve
    patch.setattr(gateway, "_refuse_failed", lambda *_: None)

    def summed(model: str, *arguments: Any, **named: Any) -> Resolved:
        aliases = gateway.store.aliases()
        if model != BASE_ID or not aliases:
            return resolve(model, *arguments, **named)
        parts = []
        for alias in aliases:
            lease = gateway.store.lease(alias.digest)
            parts.append(read_adapter(lease.path))
            lease.release()
        total = combine(parts, [1.0] * len(parts), method="concat").adapter
        digest = gateway.engine.add_adapter("all", total)
        gateway.adapters._loaded.setdefault(digest, NoLease())
        gateway.engine.add_adapter(digest, total)
        return Resolved("all", "all", None, digest)

    patch.setattr(gateway.adapters, "resolve", summed)


def reload_is_ignored(running: Running, patch: Any) -> None:
    """A name that is there keeps its weights."""
    store = running.gateway.store
    add = store.add_staged

    def first_only(name: str, *arguments: Any, **named: Any) -> Any:
        is_known = store.find_alias(name) is not None
        return add(name, *arguments, **{**named, "promote": not is_known})

    patch.setattr(store, "add_staged", first_only)


def unload_is_ignored(running: Running, patch: Any) -> None:
    """The route answers, and nothing happens."""
    patch.setattr(running.gateway.adapters, "unload", lambda *_, **__: None)


def unload_means_base(running: Running, patch: Any) -> None:
    """What was unloaded is answered by the base from then on; unknown names are refused."""
    adapters = running.gateway.adapters
    resolve, gone = adapters.resolve, set[str]()

    def forget(digest: str, **_: Any) -> None:
        gone.add(digest)

    def kind(model: str, *arguments: Any, **named: Any) -> Resolved:
        found = resolve(model, *arguments, **named)
        return Resolved(BASE_ID, BASE_ID, None, None) if found.digest in gone else found

    patch.setattr(adapters, "unload", forget)
    patch.setattr(adapters, "resolve", kind)


def paths_are_models(running: Running, patch: Any) -> None:
    """A model that is a directory is loaded (vLLM's filesystem resolver before #46287)."""
    gateway = running.gateway
    resolve = gateway.adapters.resolve

    def anywhere(model: str, *arguments: Any, **named: Any) -> Resolved:
        path = Path(model.replace("\x00", "_"))
        if "/" not in model or not (path / "adapter_config.json").exists():
            return resolve(model, *arguments, **named)
        digest = gateway.engine.add_adapter("found", path)
        gateway.engine.add_adapter(digest, path)
        gateway.adapters._loaded.setdefault(digest, NoLease())
        return Resolved(model, "found", None, digest)

    patch.setattr(gateway.adapters, "resolve", anywhere)


def any_name_will_do(running: Running, patch: Any) -> None:
    """Names are not checked when an adapter is added."""
    from lorasmith.store import store as store_module

    patch.setattr(store_module, "check_name", lambda name: name)


def bad_adapter_stops_the_server(running: Running, patch: Any) -> None:
    """vllm#3310: an adapter that cannot be loaded takes the process with it."""
    store = running.gateway.store
    add = store.add_staged

    def fatal(*arguments: Any, **named: Any) -> Any:
        try:
            return add(*arguments, **named)
        except AdapterFileError:
            running.server.should_exit = running.server.force_exit = True
            raise

    patch.setattr(store, "add_staged", fatal)


def bad_adapter_means_base(running: Running, patch: Any) -> None:
    """vllm#55193: an adapter of which nothing applies is accepted, and the base answers."""
    accepted = set[str]()
    resolve = running.gateway.adapters.resolve
    inner = running.app

    def kind(model: str, *arguments: Any, **named: Any) -> Resolved:
        return (
            Resolved(BASE_ID, BASE_ID, None, None)
            if model in accepted
            else resolve(model, *arguments, **named)
        )

    patch.setattr(running.gateway.adapters, "resolve", kind)
    store = running.gateway.store
    add, find = store.add_staged, store.resolve

    class Accepted:
        digest, base = "0" * 64, None

        def to_dict(self) -> dict[str, Any]:
            return {}

    def lenient(name: str, *arguments: Any, **named: Any) -> Any:
        try:
            return add(name, *arguments, **named)
        except AdapterFileError:
            accepted.add(name)
            return Accepted()

    patch.setattr(store, "add_staged", lenient)
    patch.setattr(store, "resolve", lambda m, **n: Accepted() if m in accepted else find(m, **n))
    load, unload = running.gateway.adapters.load, running.gateway.adapters.unload
    patch.setattr(running.gateway.adapters, "load", lambda d, b: None if d == Accepted.digest else load(d, b))
    patch.setattr(
        running.gateway.adapters, "unload", lambda d, **n: None if d == Accepted.digest else unload(d, **n)
    )
    return inner


def too_many_are_lost(running: Running, patch: Any) -> Any:
    """More than a few at once get 500s."""
    inner, flying = running.app, 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal flying
        if scope["type"] != "http" or not scope["path"].endswith("completions"):
            return await inner(scope, receive, send)
        flying += 1
        try:
            if flying > 16:
                return await JSONResponse({"error": {"message": "lost"}}, 500)(scope, receive, send)
            await inner(scope, receive, send)
        finally:
            flying -= 1

    return app


def who_leaves_keeps_the_row(running: Running, patch: Any) -> None:
    """Rows of clients that hung up are never free again."""
    close = running.gateway.close_running

    def leaky(row: Any, outcome: str) -> None:
        if outcome != "disconnected":
            close(row, outcome)

    patch.setattr(running.gateway, "close_running", leaky)


def speaks_vllm(running: Running, _: Any) -> Any:
    """vLLM's runtime updates, over our store; nothing is broken."""
    inner, gateway = running.app, running.gateway

    def load(body: dict[str, Any]) -> None:
        facts = facts_of(gateway)
        version = gateway.store.add(body.get("lora_name", ""), body.get("lora_path", ""), base=facts)
        gateway.adapters.restore(version.digest)
        gateway.adapters.load(version.digest, None)

    def unload(body: dict[str, Any]) -> None:
        gateway.store.remove(body["lora_name"], drop_aliases=True)

    routes = {"/v1/load_lora_adapter": load, "/v1/unload_lora_adapter": unload}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] not in routes:
            return await inner(scope, receive, send)
        status, said = 200, "done"
        try:
            routes[scope["path"]](await _json_body(receive))
        except LoraSmithError as error:
            status, said = 400, str(error)
        await JSONResponse({"message": said}, status)(scope, receive, send)

    return app


def speaks_llama(running: Running, patch: Any) -> Any:
    """llama-server: `model` means nothing, `lora` gives scales by number, and by default all adapters apply."""
    base_means_all(running, patch)
    inner, gateway = running.app, running.gateway

    async def app(scope: Any, receive: Any, send: Any) -> None:
        names = sorted(alias.alias for alias in gateway.store.aliases()) if scope["type"] == "http" else []
        if scope.get("path") == "/lora-adapters":
            listed = [
                {"id": i, "path": f"/x/{name}/adapter.gguf", "scale": 1.0} for i, name in enumerate(names)
            ]
            return await JSONResponse(listed)(scope, receive, send)
        if not scope.get("path", "").endswith("completions"):
            return await inner(scope, receive, send)
        body = await _json_body(receive)
        lora = body.pop("lora", None)
        body["model"] = names[lora[0]["id"]] if lora else BASE_ID
        raw, is_given = json.dumps(body).encode(), False

        async def changed() -> Any:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": raw, "more_body": False}

        await inner(scope, changed, send)

    return app


async def _json_body(receive: Any) -> dict[str, Any]:
    raw, more = b"", True
    while more:
        message = await receive()
        raw += message.get("body", b"")
        more = message.get("more_body", False)
    body: dict[str, Any] = json.loads(raw or b"{}")
    return body
