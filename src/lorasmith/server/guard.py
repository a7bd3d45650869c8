"""Before any route: who asks, is the host ours, does the body fit. Nothing passes that isn't let through."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lorasmith.errors import AccessError, LoraSmithError
from lorasmith.server.config import ServerConfig
from lorasmith.server.keys import Keys, Principal
from lorasmith.server.status import HTTP_CODES, body_of, error_body, headers_of, status_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
LIVE = "/healthz"
STREAMED_BODY = "/admin/uploads/"  # its route reads, counts and limits the body itself
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
log = logging.getLogger("lorasmith.server")


class _RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """ASGI middleware, the outermost one.

    Args:
        local_only: refuse other `Host` headers than this machine's: without keys, a web page that a browser
            opens could otherwise reach the server under a name of its own (DNS rebinding).
    """

    def __init__(self, app: App, *, keys: Keys, config: ServerConfig, local_only: bool) -> None:
        self._app, self._keys, self._config, self._local_only = app, keys, config, local_only

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        request_id = _request_id(headers)
        seen = _Seen(send, request_id)
        scope.setdefault("state", {})["request_id"] = request_id
        try:
            await self._check(scope, headers)
            receive = await self._with_body(scope, headers, receive)
            await self._app(scope, receive, seen)
        except _RefusedError as refused:
            code = HTTP_CODES[refused.status]
            body = error_body(str(refused), "invalid_request_error", code, request_id)
            await _answer(seen, refused.status, body, {})
        except Exception as error:
            if not isinstance(error, LoraSmithError):
                log.error("the server failed", exc_info=error, extra={"fields": {"request_id": request_id}})
            if seen.status is not None:  # the answer has begun: all that is left is to break it off
                raise
            await _answer(seen, status_of(error), body_of(error, request_id), headers_of(error))
        finally:
            self._log(scope, seen)

    async def _check(self, scope: Message, headers: dict[str, str]) -> None:
        host = (
            headers.get("host", "").rsplit(":", 1)[0]
            if headers.get("host", "")[-1:].isdigit()
            else headers.get("host", "")
        )
        if self._local_only and host not in LOCAL_HOSTS:
            raise _RefusedError(404, "this server has no keys, so it answers to local names only")
        if scope["path"] == LIVE:
            return
        principal = self._keys.identify(headers.get("authorization"))
        _require_role(principal, scope["path"], self._keys)
        scope["state"]["principal"] = principal
        is_json = headers.get("content-type", "").split(";")[0].strip().lower() == "application/json"
        if scope["method"] == "POST" and not is_json:  # also keeps out forms of foreign web pages
            raise _RefusedError(415, "send JSON, with content-type: application/json")

    async def _with_body(self, scope: Message, headers: dict[str, str], receive: Receive) -> Receive:
        """Read the body, within its limits, and hand it on."""
        if scope["path"].startswith(STREAMED_BODY):
            return receive
        most = self._config.max_body_bytes
        too_large = _RefusedError(413, f"the body is larger than the {most:,} bytes that are allowed")
        if (length := headers.get("content-length", "0")).isdigit() and int(length) > most:
            raise too_large
        body, more = b"", True
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise _RefusedError(408, "the body did not arrive in time") from None
        return _replay(body, receive)

    def _log(self, scope: Message, seen: _Seen) -> None:
        principal = scope["state"].get("principal")
        fields = {
            "request_id": seen.request_id, "method": scope["method"], "path": scope["path"][:200],
            "status": seen.status, "seconds": round(time.monotonic() - seen.began, 4),
            "tenant": None if principal is None else principal.tenant.name,
            "role": None if principal is None else principal.role, **scope["state"].get("log", {}),
        }  # fmt: skip
        level = logging.DEBUG if scope["path"] in (LIVE, "/ready", "/metrics") else logging.INFO
        log.log(level, "request", extra={"fields": fields})


class _Seen:
    """Adds the request's id to the answer, and remembers its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status: int | None = None
        self.began = time.monotonic()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            extra = [(b"x-request-id", self.request_id.encode()), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await self._send(message)


def _require_role(principal: Principal, path: str, keys: Keys) -> None:
    if path == "/admin" or path.startswith("/admin/"):
        if not keys.has_admin:
            raise _RefusedError(404, "there is no admin API here: no admin key was set")
        if principal.role != "admin":
            raise AccessError("the admin API needs an admin key")
    elif path in ("/metrics", "/ready"):
        if principal.role == "tenant" and not keys.is_open:
            raise AccessError("this needs an admin or a monitor key")
    elif path.startswith("/v1/") and principal.role != "tenant":
        raise AccessError("this needs a tenant's key; an admin or monitor key generates nothing")


def _request_id(headers: dict[str, str]) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)


def _replay(body: bytes, receive: Receive) -> Receive:
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()  # what is left is the disconnect
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(send: Send, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
    raw = json.dumps(body).encode()
    fields = {"content-type": "application/json", "content-length": str(len(raw)), **headers}
    if status == 401:
        fields["www-authenticate"] = "Bearer"
    pairs = [(k.encode(), v.encode()) for k, v in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": raw})
