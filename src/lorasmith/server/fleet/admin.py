"""The admin API of several replicas. They share one store, so what changes it is done here, once."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from lorasmith.server.admin import (
    DrainBody,
    ModelBody,
    RemoveBody,
    Uploads,
    add_aliases,
    add_reading,
    add_uploads,
)
from lorasmith.server.fleet.ingress import Ingress


def routes(ingress: Ingress, uploads: Uploads) -> APIRouter:
    """The router, around an ingress."""
    router = APIRouter(prefix="/admin")
    store, names, run = ingress.store, ingress.names, ingress.in_thread

    @router.get("/status")
    async def status() -> dict[str, Any]:
        why_not = ingress.why_not_ready()
        return {
            "ready": why_not is None, "why_not": why_not, "draining": ingress.is_draining,
            "base": ingress.config.base_id, "running_rows": ingress.queue.running_rows,
            "waiting": ingress.queue.waiting, "workers": ingress.pool.status(),
        }  # fmt: skip

    @router.post("/load")
    async def load(body: ModelBody) -> dict[str, Any]:
        """Replicas load what they are asked for; this lets requests through again."""
        version = await run(store.resolve, body.model)
        names.restore(version.digest)
        return version.to_dict()

    @router.post("/unload")
    async def unload(body: ModelBody) -> dict[str, Any]:
        """No request reaches it any more; replicas forget it as their memory is wanted."""
        version = await run(store.resolve, body.model)
        names.withdraw(version.digest)
        return version.to_dict()

    @router.post("/remove")
    async def remove(body: RemoveBody) -> dict[str, Any]:
        gone = await run(store.remove, body.model, drop_aliases=body.drop_aliases)
        return {"removed": [v.to_dict() for v in gone]}

    @router.post("/drain")
    async def drain(body: DrainBody) -> dict[str, Any]:
        await ingress.drain(body.timeout_s)
        return {"draining": True, "running_rows": ingress.queue.running_rows}

    add_reading(router, ingress)
    add_aliases(router, ingress)
    add_uploads(router, ingress, uploads, lambda: ingress.facts)
    return router
