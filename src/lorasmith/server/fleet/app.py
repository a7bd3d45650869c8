"""The application around an ingress: OpenAI's routes, probes, and the admin API's store half."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response

from lorasmith.engine import encode_prompt
from lorasmith.errors import ConfigError, LoraSmithError
from lorasmith.server.admin import Uploads
from lorasmith.server.answers import as_event
from lorasmith.server.app import ERRORS, KEY, add_error_handlers, add_probes
from lorasmith.server.completions import (
    ANSWER,
    ClientGoneError,
    EventStream,
    add_models,
    canary_key,
    tenant_of,
    while_connected,
)
from lorasmith.server.fleet.admin import routes as admin_routes
from lorasmith.server.fleet.ingress import Ingress, Passing
from lorasmith.server.fleet.pool import Call
from lorasmith.server.gateway import outcome_of
from lorasmith.server.guard import App, Guard
from lorasmith.server.protocol import ChatRequest, CompletionRequest, Settings
from lorasmith.server.status import body_of

PASSED = ("content-type", "cache-control", "x-accel-buffering", "retry-after")
BYTES_PER_TOKEN = 3  # of a prompt, to order who waits; quotas count tokens


def create_fleet_app(ingress: Ingress, *, local_only: bool = False) -> App:
    """The application; it starts and stops the ingress with itself."""
    uploads = Uploads(ingress.store)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await ingress.start()
        yield
        uploads.close()
        await ingress.close()

    async def metrics() -> bytes:
        return ingress.metrics.text(await ingress.pool.metrics())

    app = FastAPI(title="lorasmith", lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS)
    app.include_router(_routes(ingress), dependencies=KEY)
    app.include_router(admin_routes(ingress, uploads), dependencies=KEY)
    add_probes(app, ingress.why_not_ready, metrics)
    add_error_handlers(app, lambda status: ingress.metrics.refused.labels(status).inc())
    return Guard(app, keys=ingress.keys, config=ingress.config, local_only=local_only)


def _routes(ingress: Ingress) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/chat/completions", responses=ANSWER)
    async def chat(body: ChatRequest, request: Request) -> Response:
        body.refuse_unsupported()
        turns = [message.as_turn() for message in body.messages]
        return await _answer(ingress, request, body, [turns], body.max_completion_tokens or body.max_tokens)

    @router.post("/completions", responses=ANSWER)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        body.refuse_unsupported()
        return await _answer(ingress, request, body, body.prompts(), body.max_tokens or 16)

    add_models(router, ingress.names, ingress.in_thread)
    return router


async def _answer(
    ingress: Ingress, request: Request, body: Settings, prompts: Sequence[Any], limit: int | None
) -> Response:
    tenant = tenant_of(request)
    rows = len(prompts) * (body.n or 1)
    if rows > ingress.config.max_choices:
        raise ConfigError(f"{rows} choices; at most {ingress.config.max_choices} are made at once")
    with ingress.queue.preparing(tenant):
        raw = json.loads(await request.body())
        call = await ingress.in_thread(_prepare, ingress, request, raw, body, prompts, limit)
    request.state.log = {"model": call.resolved.model, "digest": call.resolved.digest}
    try:
        passing = await while_connected(request, ingress.admit(call))
    except ClientGoneError:
        return Response(status_code=499)
    reply = passing.reply
    assert reply is not None
    request.state.log |= {"replica": reply.replica, "tries": len(passing.tries) + 1}
    headers = {k: v for k, v in reply.headers.items() if k in PASSED or k.startswith("x-lorasmith-")}
    if call.is_streamed and reply.status == 200:
        return EventStream(
            _events(ingress, passing),
            headers,
            left_s=lambda: ingress.left_s(passing),
            end=partial(ingress.leave, passing),
        )
    await ingress.leave(passing, "ok" if reply.status == 200 else "refused")
    return Response(passing.first, reply.status, headers)


def _prepare(
    ingress: Ingress,
    request: Request,
    raw: dict[str, Any],
    body: Settings,
    prompts: Sequence[Any],
    limit: int | None,
) -> Call:
    """Resolve the model and count; in a worker thread."""
    tenant, request_id = tenant_of(request), request.state.request_id
    resolved = ingress.names.resolve(body.model, tenant, key=canary_key(tenant, body, request_id))
    most = limit or ingress.config.default_max_tokens
    counts = [_tokens(ingress, prompt, is_exact=bool(tenant.tokens_per_minute)) for prompt in prompts]
    rows = len(prompts) * (body.n or 1)
    sent = raw | {"model": resolved.digest or resolved.name}
    if body.stream:
        sent["stream_options"] = {"include_usage": True}
    return Call(
        path=request.url.path,
        body=json.dumps(sent).encode(),
        tenant=tenant,
        resolved=resolved,
        request_id=request_id,
        rows=rows,
        tokens=sum(counts) * (body.n or 1) + most * rows,
        is_streamed=bool(body.stream),
        wants_usage=body.stream_options is not None and body.stream_options.include_usage,
    )


def _tokens(ingress: Ingress, prompt: Any, *, is_exact: bool) -> int:
    if is_exact:
        return len(encode_prompt(prompt, ingress.tokenizer, 1 << 62, use_template=False))
    if prompt and isinstance(prompt[0], dict):
        return sum(len(turn["content"]) for turn in prompt) // BYTES_PER_TOKEN + 1
    return len(prompt) // BYTES_PER_TOKEN + 1 if isinstance(prompt, str) else len(prompt)


async def _events(ingress: Ingress, passing: Passing) -> AsyncIterator[bytes]:
    try:
        async for piece in ingress.pieces(passing):
            yield piece
        await ingress.leave(passing, passing.meter.ending or "failed")
    except LoraSmithError as error:
        await ingress.leave(passing, outcome_of(error))
        yield as_event(body_of(error, passing.call.request_id))
