"""The admin API: what is served, and how that changes. It takes names and ids, never paths or archives."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from lorasmith.bases import match_base, read_headers
from lorasmith.errors import ConfigError, DeadlineError, OverloadedError, UnknownAdapterError
from lorasmith.server.gateway import Gateway
from lorasmith.store import BaseFacts, Staged

MAX_UPLOADS = 16
LONGEST_UPLOAD_S = 3600.0


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


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
    version: int
    share: float


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


class Uploads:
    """Adapters on their way in, each in a private directory of the store, under an id of ours."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._open: dict[str, tuple[ExitStack, Staged, float]] = {}

    def begin(self) -> str:
        """Make room for one adapter; return its id."""
        for old in [
            u for u, (*_, since) in self._open.items() if time.monotonic() - since > LONGEST_UPLOAD_S
        ]:
            self.drop(old)
        if len(self._open) >= MAX_UPLOADS:
            raise OverloadedError(f"{MAX_UPLOADS} uploads are open; finish or drop one", 60)
        stack = ExitStack()
        staged = stack.enter_context(self._gateway.store.stage())
        upload = secrets.token_hex(16)
        self._open[upload] = (stack, staged, time.monotonic())
        return upload

    def get(self, upload: str) -> Staged:
        """The directory of an upload."""
        if upload not in self._open:
            raise UnknownAdapterError("there is no upload of that id")
        return self._open[upload][1]

    def drop(self, upload: str) -> None:
        """Delete what is left of an upload."""
        self.get(upload)
        self._open.pop(upload)[0].close()

    def close(self) -> None:
        """Drop all."""
        for upload in list(self._open):
            self.drop(upload)


def routes(gateway: Gateway, uploads: Uploads) -> APIRouter:
    """The router, around a gateway."""
    router = APIRouter(prefix="/admin")
    store, adapters, run = gateway.store, gateway.adapters, gateway.in_thread

    @router.get("/status")
    async def status() -> dict[str, Any]:
        return {
            "ready": gateway.why_not_ready() is None, "why_not": gateway.why_not_ready(),
            "draining": gateway.is_draining, "base": gateway.config.base_id,
            "base_fingerprint": gateway.base_fingerprint, "loaded": adapters.loaded,
            "running_rows": gateway.queue.running_rows, "waiting": gateway.queue.waiting,
            "isolation_mismatches": gateway.mismatches, "engine_restarts": gateway.engine.restarts,
        }  # fmt: skip

    @router.get("/adapters")
    async def listed() -> dict[str, Any]:
        versions, aliases = await run(store.versions), await run(store.aliases)
        return {"versions": [v.to_dict() for v in versions], "aliases": [a.to_dict() for a in aliases]}

    @router.get("/audit")
    async def audit(limit: int = 100) -> dict[str, Any]:
        return {"entries": [vars(e) for e in await run(store.audit, max(1, min(limit, 1000)))]}

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

    @router.post("/alias")
    async def alias(body: AliasBody) -> dict[str, Any]:
        _refuse_base_name(gateway, body.alias)
        return (await run(store.set_alias, body.alias, body.model)).to_dict()

    @router.post("/canary")
    async def canary(body: CanaryBody) -> dict[str, Any]:
        return (await run(store.set_canary, body.alias, body.version, body.share)).to_dict()

    @router.post("/rollback")
    async def rollback(body: RollbackBody) -> dict[str, Any]:
        return (await run(store.rollback, body.alias)).to_dict()

    @router.post("/remove")
    async def remove(body: RemoveBody) -> dict[str, Any]:
        gone = await run(store.remove, body.model, drop_aliases=body.drop_aliases)
        await run(adapters.sweep)
        return {"removed": [v.to_dict() for v in gone]}

    @router.post("/drain")
    async def drain(body: DrainBody) -> dict[str, Any]:
        await gateway.drain(body.timeout_s)
        return {"draining": True, "running_rows": gateway.queue.running_rows}

    @router.post("/uploads")
    async def begin() -> dict[str, Any]:
        return {"upload": await run(uploads.begin)}

    @router.put("/uploads/{upload}/{file}")
    async def put(upload: str, file: str, request: Request) -> dict[str, Any]:
        staged = uploads.get(upload)
        size = await _receive_file(gateway, staged, file, request.stream())
        return {"upload": upload, "file": file, "bytes": size}

    @router.delete("/uploads/{upload}")
    async def drop(upload: str) -> dict[str, Any]:
        await run(uploads.drop, upload)
        return {"upload": upload, "dropped": True}

    @router.post("/adapters")
    async def add(body: AddBody) -> dict[str, Any]:
        staged = uploads.get(body.upload)
        try:
            _refuse_base_name(gateway, body.name)
            version = await run(
                store.add_staged, body.name, staged, base=base_facts(gateway), promote=body.promote
            )
        finally:
            await run(uploads.drop, body.upload)
        return version.to_dict()

    return router


def base_facts(gateway: Gateway) -> BaseFacts | None:
    """What an upload must fit."""
    base = gateway.base
    if base.directory is None:
        return None
    shapes = {name: tensor.shape for name, tensor in read_headers(base.directory).items()}
    if gateway.config.allow_base_mismatch:
        return BaseFacts(gateway.config.base_id, shapes, lambda _: None)
    return BaseFacts(gateway.config.base_id, shapes, lambda p: match_base(p, base.fingerprint))


def _refuse_base_name(gateway: Gateway, name: str) -> None:
    if name == gateway.config.base_id:
        raise ConfigError(f'"{name}" is what the base is called here; choose another name')


async def _receive_file(gateway: Gateway, staged: Staged, name: str, body: AsyncIterator[bytes]) -> int:
    """From the socket to the disk, a piece at a time, through a short queue and a thread of its own."""
    pieces: asyncio.Queue[bytes | None] = asyncio.Queue(8)
    loop = asyncio.get_running_loop()

    def taken() -> Iterator[bytes]:
        while (piece := asyncio.run_coroutine_threadsafe(pieces.get(), loop).result()) is not None:
            yield piece

    limit = gateway.config.max_upload_bytes
    writing = asyncio.ensure_future(asyncio.to_thread(staged.write, name, taken(), max_bytes=limit))
    try:
        while not writing.done():
            async with asyncio.timeout(gateway.config.body_timeout_s):
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
