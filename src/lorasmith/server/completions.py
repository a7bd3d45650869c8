"""The routes of OpenAI's API: chat, completions, models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from lorasmith import engine
from lorasmith.engine import Result, TokenEvent, encode_prompt
from lorasmith.errors import ConfigError, DeadlineError, LoraSmithError
from lorasmith.server.answers import Receipt, Shape, as_event
from lorasmith.server.gateway import Asked, Gateway, Running, outcome_of, seeded
from lorasmith.server.keys import Tenant
from lorasmith.server.names import Names, Resolved
from lorasmith.server.protocol import ChatRequest, CompletionRequest, Settings
from lorasmith.server.status import body_of

T = TypeVar("T")
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "the answer, or with `stream` its events", "content": {"text/event-stream": {}}}
}
UNREAD_S = 1.0  # so that the stream's own deadline, which can still say why, comes first
DEFAULT_TEMPERATURE = 1.0  # as OpenAI's API documents it


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def routes(gateway: Gateway) -> APIRouter:
    """The router, around a gateway."""
    router = APIRouter(prefix="/v1")

    @router.post("/chat/completions", responses=ANSWER)
    async def chat(body: ChatRequest, request: Request) -> Response:
        body.refuse_unsupported()
        turns = [message.as_turn() for message in body.messages]
        limit = body.max_completion_tokens or body.max_tokens
        return await _answer(gateway, request, body, [turns], limit, bool(body.logprobs))

    @router.post("/completions", responses=ANSWER)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        body.refuse_unsupported()
        return await _answer(
            gateway, request, body, body.prompts(), body.max_tokens or 16, body.logprobs is not None
        )

    add_models(router, gateway.adapters, gateway.in_thread)
    return router


def add_models(router: APIRouter, names: Names, in_thread: Callable[..., Awaitable[Any]]) -> None:
    """What may be asked."""

    @router.get("/models")
    async def models(request: Request) -> dict[str, Any]:
        found = await in_thread(names.models, tenant_of(request))
        return {"object": "list", "data": found}

    @router.get("/models/{model:path}")
    async def model(model: str, request: Request) -> dict[str, Any]:
        resolved = await in_thread(names.resolve, model, tenant_of(request))
        about = {"digest": resolved.digest, "version": resolved.version, "name": resolved.name}
        parent = names.base_id if resolved.digest else None
        return {
            "id": model, "object": "model", "created": 0, "owned_by": "lorasmith", "parent": parent,
            "lorasmith": about,
        }  # fmt: skip


async def _answer(
    gateway: Gateway,
    request: Request,
    body: Settings,
    prompts: Sequence[Any],
    limit: int | None,
    logprobs: bool,
) -> Response:
    tenant, request_id = tenant_of(request), request.state.request_id
    _refuse_many(gateway, len(prompts) * (body.n or 1))
    with gateway.queue.preparing(tenant):
        asked = await gateway.in_thread(
            _prepare, gateway, tenant, request_id, body, prompts, limit, logprobs, _resolved(request)
        )
    request.state.log = {"model": asked.resolved.model, "digest": asked.resolved.digest}
    receipt = Receipt(asked.resolved, gateway.config.base_id, gateway.base_fingerprint)
    shape = Shape.new(
        is_chat=isinstance(body, ChatRequest),
        request_id=request_id,
        receipt=receipt,
        tokenizer=gateway.base.tokenizer,
        choices=body.n or 1,
        logprobs=logprobs,
    )
    try:
        if not asked.is_streamed:
            results = await while_connected(request, _whole(gateway, asked, request))
            return JSONResponse(shape.whole(results), headers=receipt.headers())
        running = await while_connected(request, gateway.admit(asked))
    except ClientGoneError:
        return Response(status_code=499)
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    events = _stream(gateway, running, shape, request_id, wants_usage=wants_usage)

    async def end(outcome: str) -> None:
        gateway.close_running(running, outcome)
        request.state.log |= _log_fields(running)

    return EventStream(events, receipt.headers(), left_s=lambda: gateway.left_s(running), end=end)


def _refuse_many(gateway: Gateway, choices: int) -> None:
    """Before the prompts are tokenised, and a `Request` is made for each."""
    if choices > gateway.config.max_choices:
        raise ConfigError(f"{choices} choices; at most {gateway.config.max_choices} are made at once")


def _prepare(
    gateway: Gateway,
    tenant: Tenant,
    request_id: str,
    body: Settings,
    prompts: Sequence[Any],
    limit: int | None,
    logprobs: bool,
    resolved: Resolved | None,
) -> Asked:
    """Resolve the model, unless an ingress did, and tokenise; in a worker thread."""
    if resolved is None:
        resolved = gateway.adapters.resolve(body.model, tenant, key=canary_key(tenant, body, request_id))
    requests = []
    for prompt in prompts:
        tokens = _tokens(gateway, prompt)
        room = gateway.engine.max_row_tokens - len(tokens)
        common: dict[str, Any] = {
            "max_tokens": limit or max(1, min(gateway.config.default_max_tokens, room)),
            "temperature": DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "top_k": body.top_k,
            "stop": body.stops(),
            "ignore_eos": body.ignore_eos,
            "logprobs": logprobs,
        }
        for choice in range(body.n or 1):
            seed = None if body.seed is None else body.seed + choice
            requests.append(seeded(engine.Request(tokens, seed=seed, **common)))
    return Asked(tenant, resolved, requests, request_id, bool(body.stream))


def canary_key(tenant: Tenant, body: Settings, request_id: str) -> str:
    """Requests of one user of a tenant get the same side of a canary."""
    return f"{tenant.name}/{body.user or request_id}"


def _resolved(request: Request) -> Resolved | None:
    return getattr(request.state, "resolved", None)


def _tokens(gateway: Gateway, prompt: Any) -> list[int]:
    tokenizer, vocab_size = gateway.base.tokenizer, gateway.engine.runner.vocab_size
    return encode_prompt(prompt, tokenizer, vocab_size, use_template=False)


async def _whole(gateway: Gateway, asked: Asked, request: Request) -> list[Result]:
    running = await gateway.admit(asked)
    outcome = "disconnected"
    try:
        async for _ in gateway.events(running):
            pass
        outcome = "ok"
        return [running.results[i] for i in sorted(running.results)]
    except LoraSmithError as error:
        outcome = outcome_of(error)
        raise
    finally:
        gateway.close_running(running, outcome)
        request.state.log |= _log_fields(running)


async def _stream(
    gateway: Gateway, running: Running, shape: Shape, request_id: str, *, wants_usage: bool
) -> AsyncIterator[bytes]:
    for chunk in shape.first(len(running.asked.requests)):
        yield as_event(chunk)
    try:
        async for index, event in gateway.events(running):
            if isinstance(event, TokenEvent):
                if event.text or (shape.logprobs and event.token_id is not None):
                    yield as_event(shape.piece(index, event.text, _logprob(shape, event)))
            else:
                yield as_event(shape.last(index, event))
        if wants_usage:
            yield as_event(shape.usage(running.results[i] for i in sorted(running.results)))
        gateway.close_running(running, "ok")
        yield b"data: [DONE]\n\n"
    except LoraSmithError as error:
        gateway.close_running(running, outcome_of(error))
        yield as_event(body_of(error, request_id))


class EventStream(StreamingResponse):
    """Ends its request even if the client left before the first byte.

    Args:
        left_s: seconds until the request's time is over.
        end: ends the request with an outcome, and does nothing if it was ended already.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        headers: Mapping[str, str],
        *,
        left_s: Callable[[], float],
        end: Callable[[str], Awaitable[None]],
    ) -> None:
        unread = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, headers={**headers, **unread}, media_type="text/event-stream")
        self._left_s, self._end = left_s, end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send, then clean up. A client that stops reading holds its rows no longer than the others."""
        try:
            async with asyncio.timeout(self._left_s() + UNREAD_S):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            await self._end("deadline")
            raise DeadlineError("the client did not read its answer in time") from None
        finally:
            await self._end("disconnected")


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Wait for `work`, unless the client leaves first; then it is cancelled."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            if task.cancelled():
                raise ClientGoneError
        return task.result()
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()


async def _disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _logprob(shape: Shape, event: TokenEvent) -> dict[str, Any] | None:
    if event.token_id is None or event.logprob is None:
        return None
    return shape.logprobs_of([event.token_id], [event.logprob])


def _log_fields(running: Running) -> dict[str, Any]:
    results = running.results.values()
    fields: dict[str, Any] = {
        "outcome": running.outcome,
        "prompt_tokens": sum(r.prompt_tokens for r in results),
        "answer_tokens": sum(len(r.token_ids) for r in results) or running.tokens_seen,
    }
    if running.first_token_at is not None:
        fields["first_token_s"] = round(running.first_token_at - running.began, 4)
    return fields


def tenant_of(request: Request) -> Tenant:
    """Whose request it is, as the guard found."""
    tenant: Tenant = request.state.principal.tenant
    return tenant
