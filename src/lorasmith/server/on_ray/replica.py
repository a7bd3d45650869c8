"""One replica: a gateway without a socket, which Ray's handles talk to."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from lorasmith.errors import EngineError
from lorasmith.server.fleet.speak import speak
from lorasmith.server.fleet.worker import WorkerSpec, worker_app
from lorasmith.server.logs import log_to_stderr


class Replica:
    """Ray makes it, asks for its health, and ends it.

    Args:
        spec: as `WorkerSpec.to_json` wrote it.
    """

    async def __init__(self, spec: str) -> None:  # type: ignore[misc]  # Ray awaits it
        log_to_stderr(logging.WARNING)  # the ingress logs the requests
        self._gateway = await asyncio.to_thread(WorkerSpec.of(spec).gateway)
        self._app = worker_app(self._gateway)
        self._name = serve.get_replica_context().replica_id.unique_id
        await self._gateway.start()

    async def answer(self, _: str, path: str, body: bytes, headers: dict[str, str]) -> AsyncIterator[Any]:
        """(name, status, headers) first, then the body's pieces. Who stops listening has hung up."""
        pieces = speak(self._app, path, body, headers)
        try:
            status, fields = await anext(pieces)
            yield self._name, status, fields
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    async def about(self) -> dict[str, Any]:
        """For /admin/status and /metrics."""
        gateway = self._gateway
        text = await gateway.in_thread(gateway.metrics.text)
        return {
            "worker": self._name, "ready": gateway.why_not_ready() is None, "why_not": gateway.why_not_ready(),
            "pid": os.getpid(), "metrics": text.decode(),
        }  # fmt: skip

    async def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        why_not = self._gateway.why_not_ready()
        if why_not is not None and not why_not.startswith("draining"):
            raise EngineError(why_not)

    async def __del__(self) -> None:
        if hasattr(self, "_gateway"):  # else it was ended while it loaded
            await self._gateway.close()
