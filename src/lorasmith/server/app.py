"""The ASGI application: the guard, the routes, errors in OpenAI's shape, start and stop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from lorasmith.errors import LoraSmithError
from lorasmith.server import admin, completions, page
from lorasmith.server.gateway import Gateway
from lorasmith.server.guard import LIVE, App, Guard
from lorasmith.server.metrics import CONTENT_TYPE
from lorasmith.server.status import HTTP_CODES, body_of, error_body, headers_of, status_of

ERROR_BODY = {
    "type": "object", "required": ["error"],
    "properties": {"error": {
        "type": "object", "required": ["message", "type", "code", "request_id"],
        "properties": {
            "message": {"type": "string"}, "type": {"type": "string"}, "code": {"type": "string"},
            "param": {"type": ["string", "null"]}, "request_id": {"type": "string"},
        },
    }},
}  # fmt: skip
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": ERROR_BODY}}}
    for status, text in (
        (400, "the request cannot be used"), (401, "no valid key"), (404, "no such model, for this key"),
        (405, "no such method here"), (408, "the body did not arrive in time"),
        (409, "an adapter of another base"), (413, "the body is too large"), (415, "the body is no JSON"),
        (422, "the adapter cannot be used"), (429, "too much at once; see Retry-After"),
        (500, "the server failed"), (503, "shutting down"), (504, "not complete in time"), (507, "no space left"),
    )
}  # fmt: skip
KEY = [Security(HTTPBearer(auto_error=False, description="where keys are set"))]  # `Guard` is what checks it


def create_app(gateway: Gateway, *, local_only: bool = False) -> App:
    """The application around a gateway; it starts and stops the gateway with itself."""
    public: Collection[str] = page.PUBLIC if gateway.config.playground else ()
    return Guard(
        create_api(gateway), keys=gateway.keys, config=gateway.config, local_only=local_only, public=public
    )


def create_api(gateway: Gateway) -> FastAPI:
    """The routes, without their guard."""
    uploads = admin.Uploads(gateway.store)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        yield
        uploads.close()
        await gateway.close()

    async def metrics() -> bytes:
        gateway.metrics.ready.set(gateway.why_not_ready() is None)
        return await gateway.in_thread(gateway.metrics.text)

    # No /docs: its page would load scripts from elsewhere.
    app = FastAPI(title="lorasmith", lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS)
    app.include_router(completions.routes(gateway), dependencies=KEY)
    app.include_router(admin.routes(gateway, uploads), dependencies=KEY)
    if gateway.config.playground:
        app.include_router(page.routes(gateway), dependencies=KEY)
    add_probes(app, gateway.why_not_ready, metrics)
    add_error_handlers(app, lambda status: gateway.metrics.refused.labels(status).inc())
    return app


def add_probes(
    app: FastAPI, why_not_ready: Callable[[], str | None], metrics_text: Callable[[], Awaitable[bytes]]
) -> None:
    """Whether it lives, whether it takes requests, and what it counts."""

    @app.get(LIVE)
    async def live() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", dependencies=KEY)
    async def ready() -> Response:
        why_not = why_not_ready()
        body = {"ready": why_not is None, "why_not": why_not}
        return JSONResponse(body, status_code=200 if why_not is None else 503)

    @app.get("/metrics", dependencies=KEY, response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(await metrics_text(), media_type=CONTENT_TYPE)


def add_error_handlers(app: FastAPI, count: Callable[[str], None]) -> None:
    """Answer errors as OpenAI's API does; count them by status."""

    @app.exception_handler(LoraSmithError)
    async def known(request: Request, error: LoraSmithError) -> Response:
        count(str(status_of(error)))
        body = body_of(error, request.state.request_id)
        return JSONResponse(body, status_of(error), headers_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        count("400")
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
