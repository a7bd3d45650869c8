"""The ASGI application: the guard, the routes, errors in OpenAI's shape, start and stop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lorasmith.errors import LoraSmithError
from lorasmith.server import admin, completions
from lorasmith.server.gateway import Gateway
from lorasmith.server.guard import LIVE, App, Guard
from lorasmith.server.metrics import CONTENT_TYPE
from lorasmith.server.status import HTTP_CODES, body_of, error_body, headers_of, status_of

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in (
        (400, "the request cannot be used"), (401, "no valid key"), (404, "no such model, for this key"),
        (409, "an adapter of another base"), (413, "the body is too large"), (415, "the body is no JSON"),
        (422, "the adapter cannot be used"), (429, "too much at once; see Retry-After"),
        (500, "the server failed"), (503, "shutting down"), (504, "not complete in time"), (507, "no space left"),
    )
}  # fmt: skip


def create_app(gateway: Gateway, *, local_only: bool = False) -> App:
    """The application around a gateway; it starts and stops the gateway with itself."""
    uploads = admin.Uploads(gateway)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        yield
        uploads.close()
        await gateway.close()

    # No /docs: its page would load scripts from elsewhere.
    app = FastAPI(title="lorasmith", lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS)
    app.include_router(completions.routes(gateway))
    app.include_router(admin.routes(gateway, uploads))
    _add_probes(app, gateway)
    _add_error_handlers(app, gateway)
    return Guard(app, keys=gateway.keys, config=gateway.config, local_only=local_only)


def _add_probes(app: FastAPI, gateway: Gateway) -> None:
    @app.get(LIVE)
    async def live() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        why_not = gateway.why_not_ready()
        gateway.metrics.ready.set(why_not is None)
        body = {"ready": why_not is None, "why_not": why_not}
        return JSONResponse(body, status_code=200 if why_not is None else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        gateway.metrics.ready.set(gateway.why_not_ready() is None)
        return Response(await gateway.in_thread(gateway.metrics.text), media_type=CONTENT_TYPE)


def _add_error_handlers(app: FastAPI, gateway: Gateway) -> None:
    @app.exception_handler(LoraSmithError)
    async def known(request: Request, error: LoraSmithError) -> Response:
        gateway.metrics.refused.labels(str(status_of(error))).inc()
        body = body_of(error, request.state.request_id)
        return JSONResponse(body, status_of(error), headers_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        gateway.metrics.refused.labels("400").inc()
        faults = [f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors()[:8]]
        param = next((str(e["loc"][1]) for e in error.errors() if len(e["loc"]) > 1), None)
        body = error_body(
            "; ".join(faults), "invalid_request_error", "invalid_value", request.state.request_id, param
        )
        return JSONResponse(body, 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = HTTP_CODES.get(error.status_code, "invalid_request")
        body = error_body(str(error.detail), "invalid_request_error", code, request.state.request_id)
        return JSONResponse(body, error.status_code, error.headers)
