"""The admin API: what is served, and how that changes. It takes names and ids, never paths or archives."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from lorasmith.errors import ConfigError, DeadlineError, OverloadedError, UnknownAdapterError
from lorasmith.server.config import ServerConfig
from lorasmith.server.gateway import Gateway
from lorasmith.store import BaseFacts, Staged, Store, Version, base_facts

T = TypeVar("T")
MAX_UPLOADS = 16
LONGEST_UPLOAD_S = 3600.0
MAX_VERSION = 999_999_999
FILE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ModelBody(_Body):
    """An alias, `alias@version` or digest."""

    model: str = Field(max_length=200)


class AliasBody(_Body):
    """Point `alias` to what `model` means."""

    alias: str
    model: str


class CanaryBody(_Body):
    """Give `version` a share of the alias's requests."""

    alias: str
    version: int = Field(ge=1, le=MAX_VERSION)
    share: float = Field(ge=0, le=1)


class RollbackBody(_Body):
    """Point `alias` to where it pointed before."""

    alias: str


class AddBody(_Body):
    """Make an upload the next version of `name`."""

    name: str
    upload: str
    promote: bool = True


class RemoveBody(_Body):
    """Remove `name@version`, or every version of `name`."""

    model: str
    drop_aliases: bool = False


class DrainBody(_Body):
    """Let in nobody new; the process stays until it is told to stop."""

    timeout_s: float | None = Field(None, ge=0, le=3600)


class Front(Protocol):
    """What changes the store: a gateway, or the ingress of several."""

    @property
    def store(self) -> Store:
        """The registry."""

    @property
    def config(self) -> ServerConfig:
        """Limits."""

    async def in_thread(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Run something that may block."""


@dataclass(eq=False)
class _Upload:
    """One adapter on its way in. While a file is being received, nobody may take it."""

    stack: ExitStack
    staged: Staged
    since: float
    receiving: int = 0


class Uploads:
    """Adapters on their way in, each in a private directory of the store, under an id of ours. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._open: dict[str, _Upload] = {}

    def begin(self) -> str:
        """Make room for one adapter; return its id."""
        self._drop_old()
        upload, stack = secrets.token_hex(16), ExitStack()
        with self._lock:
            if len(self._open) >= MAX_UPLOADS:
                raise OverloadedError(f"{MAX_UPLOADS} uploads are open; finish or drop one", 60)
            staged = stack.enter_context(self._store.stage())
            self._open[upload] = _Upload(stack, staged, time.monotonic())
        return upload

    @contextmanager
    def receiving(self, upload: str) -> Iterator[Staged]:
        """The directory of an upload, while one file comes in."""
        with self._lock:
            found = self._get(upload)
            found.receiving += 1
        try:
            yield found.staged
        finally:
            with self._lock:
                found.receiving -= 1

    @contextmanager
    def taken(self, upload: str) -> Iterator[Staged]:
        """The directory of an upload, which nobody can write to any more and which is gone afterwards.

        Raises:
            ConfigError: a file of it is still coming in.
        """
        with self._lock:
            if self._get(upload).receiving:
                raise ConfigError("a file of this upload is still coming in")
            found = self._open.pop(upload)
        with found.stack:
            yield found.staged

    def drop(self, upload: str) -> None:
        """Delete what is left of an upload."""
        with self.taken(upload):
            pass

    def close(self) -> None:
        """Drop all."""
        with self._lock:
            everything, self._open = list(self._open.values()), {}
        for upload in everything:
            upload.stack.close()

    def _drop_old(self) -> None:
        now = time.monotonic()
        with self._lock:
            old = [u for u, x in self._open.items() if now - x.since > LONGEST_UPLOAD_S and not x.receiving]
        for upload in old:
            with suppress(UnknownAdapterError):
                self.drop(upload)

    def _get(self, upload: str) -> _Upload:
        if upload not in self._open:
            raise UnknownAdapterError("there is no upload of that id")
        return self._open[upload]


def routes(gateway: Gateway, uploads: Uploads) -> APIRouter:
    """The router, around a gateway."""
    router = APIRouter(prefix="/admin")
    _add_status(router, gateway)
    add_reading(router, gateway)
    _add_serving(router, gateway)
    add_aliases(router, gateway)
    add_uploads(router, gateway, uploads, lambda: facts_of(gateway))
    return router


def _add_status(router: APIRouter, gateway: Gateway) -> None:
    @router.get("/status")
    async def status() -> dict[str, Any]:
        return {
            "ready": gateway.why_not_ready() is None, "why_not": gateway.why_not_ready(),
            "draining": gateway.is_draining, "base": gateway.config.base_id,
            "base_fingerprint": gateway.base_fingerprint, "loaded": gateway.adapters.loaded,
            "running_rows": gateway.queue.running_rows, "waiting": gateway.queue.waiting,
            "isolation_mismatches": gateway.mismatches, "engine_restarts": gateway.engine.restarts,
        }  # fmt: skip


def add_reading(router: APIRouter, front: Front) -> None:
    """What the store holds, and who changed it."""
    store, run = front.store, front.in_thread

    @router.get("/adapters")
    async def listed() -> dict[str, Any]:
        versions, aliases = await run(store.versions), await run(store.aliases)
        return {"versions": [v.to_dict() for v in versions], "aliases": [a.to_dict() for a in aliases]}

    @router.get("/audit")
    async def audit(limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
        return {"entries": [vars(e) for e in await run(store.audit, limit)]}


def _add_serving(router: APIRouter, gateway: Gateway) -> None:
    store, adapters, run = gateway.store, gateway.adapters, gateway.in_thread

    @router.post("/load")
    async def load(body: ModelBody) -> dict[str, Any]:
        version = await run(store.resolve, body.model)
        adapters.restore(version.digest)
        await run(adapters.load, version.digest, None if version.base is None else dict(version.base))
        return version.to_dict()

    @router.post("/unload")
    async def unload(body: ModelBody) -> dict[str, Any]:
        version = await run(store.resolve, body.model)
        await run(adapters.unload, version.digest)
        return version.to_dict()

    @router.post("/remove")
    async def remove(body: RemoveBody) -> dict[str, Any]:
        gone = await run(store.remove, body.model, drop_aliases=body.drop_aliases)
        await run(adapters.sweep)
        return {"removed": [v.to_dict() for v in gone]}

    @router.post("/drain")
    async def drain(body: DrainBody) -> dict[str, Any]:
        await gateway.drain(body.timeout_s)
        return {"draining": True, "running_rows": gateway.queue.running_rows}


def add_aliases(router: APIRouter, front: Front) -> None:
    """What names mean."""
    store, run = front.store, front.in_thread

    @router.post("/alias")
    async def alias(body: AliasBody) -> dict[str, Any]:
        _refuse_base_name(front, body.alias)
        return (await run(store.set_alias, body.alias, body.model)).to_dict()

    @router.post("/canary")
    async def canary(body: CanaryBody) -> dict[str, Any]:
        return (await run(store.set_canary, body.alias, body.version, body.share)).to_dict()

    @router.post("/rollback")
    async def rollback(body: RollbackBody) -> dict[str, Any]:
        return (await run(store.rollback, body.alias)).to_dict()


def add_uploads(
    router: APIRouter, front: Front, uploads: Uploads, facts: Callable[[], BaseFacts | None]
) -> None:
    """Adapters that come in."""
    run = front.in_thread

    @router.post("/uploads")
    async def begin() -> dict[str, Any]:
        return {"upload": await run(uploads.begin)}

    @router.put("/uploads/{upload}/{file}", openapi_extra=FILE_BODY)
    async def put(upload: str, file: str, request: Request) -> dict[str, Any]:
        with uploads.receiving(upload) as staged:
            size = await _receive_file(front, staged, file, request.stream())
        return {"upload": upload, "file": file, "bytes": size}

    @router.delete("/uploads/{upload}")
    async def drop(upload: str) -> dict[str, Any]:
        await run(uploads.drop, upload)
        return {"upload": upload, "dropped": True}

    @router.post("/adapters")
    async def add(body: AddBody) -> dict[str, Any]:
        return (await run(_add, front, uploads, body, facts)).to_dict()


def _add(front: Front, uploads: Uploads, body: AddBody, facts: Callable[[], BaseFacts | None]) -> Version:
    with uploads.taken(body.upload) as staged:
        _refuse_base_name(front, body.name)
        return front.store.add_staged(body.name, staged, base=facts(), promote=body.promote)


def facts_of(gateway: Gateway) -> BaseFacts | None:
    """What an upload must fit."""
    base, config = gateway.base, gateway.config
    if base.directory is None:
        return None
    return base_facts(
        base.directory, config.base_id, quantize=base.quantised, allow_mismatch=config.allow_base_mismatch
    )


def _refuse_base_name(front: Front, name: str) -> None:
    if name == front.config.base_id:
        raise ConfigError(f'"{name}" is what the base is called here; choose another name')


async def _receive_file(front: Front, staged: Staged, name: str, body: AsyncIterator[bytes]) -> int:
    """From the socket to the disk, a piece at a time, through a short queue and a thread of its own."""
    pieces: asyncio.Queue[bytes | None] = asyncio.Queue(8)
    loop = asyncio.get_running_loop()

    def taken() -> Iterator[bytes]:
        while (piece := asyncio.run_coroutine_threadsafe(pieces.get(), loop).result()) is not None:
            yield piece

    limit = front.config.max_upload_bytes
    writing = asyncio.ensure_future(asyncio.to_thread(staged.write, name, taken(), max_bytes=limit))
    try:
        while not writing.done():
            async with asyncio.timeout(front.config.body_timeout_s):
                piece = await anext(body, None)
            putting = asyncio.ensure_future(pieces.put(piece))
            await asyncio.wait({putting, writing}, return_when=asyncio.FIRST_COMPLETED)
            putting.cancel()
            if piece is None:
                break
    except TimeoutError:
        raise DeadlineError("the upload stalled") from None
    finally:
        if not writing.done():
            await pieces.put(None)
    return await writing
