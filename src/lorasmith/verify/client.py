"""HTTP as a user of the server would speak it. Nothing here raises for what a server does: it is all evidence."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from lorasmith.errors import ConfigError
from lorasmith.verify.probes import Messages

REFUSED = range(400, 500)
BUSY = (429, 503)


@dataclass(frozen=True)
class Reply:
    """What came back. Status 0: nothing did, and `text` says what happened instead."""

    status: int
    text: str
    seconds: float
    body: Any = None
    retry_after: str | None = None

    @property
    def is_refusal(self) -> bool:
        """A clear no: a 4xx."""
        return self.status in REFUSED

    @property
    def is_busy(self) -> bool:
        """Too much at once; ask again later."""
        return self.status in BUSY

    @property
    def is_ok(self) -> bool:
        """A 2xx."""
        return 200 <= self.status < 300

    def __str__(self) -> str:
        said = " ".join(self.text.split())[:160]
        return f"HTTP {self.status}: {said}" if self.status else said


class Client:
    """One server, with and without the admin's key. Keys are never part of what it reports."""

    def __init__(
        self, url: str, *, key: str | None = None, admin_key: str | None = None, timeout_s: float = 120.0
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConfigError("the URL must be like http://127.0.0.1:8000, without a key in it (use --key)")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key, self._admin_key, self.timeout_s = key, admin_key, timeout_s
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(base_url=self.url, limits=limits, timeout=timeout_s, trust_env=False)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def send(
        self,
        method: str,
        path: str,
        *,
        as_admin: bool = False,
        json: Any = None,
        content: bytes | None = None,
    ) -> Reply:
        """One request, and whatever comes of it."""
        began = time.monotonic()
        try:
            response = await self._http.request(
                method, path, json=json, content=content, headers=self._headers(as_admin)
            )
        except httpx.TimeoutException:
            return Reply(0, f"no answer within {self.timeout_s:g} s", time.monotonic() - began)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return Reply(0, f"{type(error).__name__}: {error}", time.monotonic() - began)
        return _reply(response, time.monotonic() - began)

    async def ask(self, fields: Mapping[str, Any], messages: Messages, max_tokens: int) -> Reply:
        """A greedy chat answer; its `text` is what the model said, or the error."""
        body = {"messages": messages, "temperature": 0, "max_tokens": max_tokens, **fields}
        reply = await self.send("POST", "/v1/chat/completions", json=body)
        try:
            said = reply.body["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            return reply
        return Reply(reply.status, said, reply.seconds, reply.body)

    async def leave_early(self, fields: Mapping[str, Any], messages: Messages, max_tokens: int) -> bool:
        """Begin a streamed answer and hang up after its first piece; whether there was one."""
        body = {"messages": messages, "temperature": 0, "max_tokens": max_tokens, "stream": True, **fields}
        with contextlib.suppress(httpx.HTTPError, OSError):
            async with self._http.stream(
                "POST", "/v1/chat/completions", json=body, headers=self._headers(False)
            ) as response:
                return await _has_piece(response.aiter_bytes())
        return False

    async def models(self) -> list[dict[str, Any]] | None:
        """Entries of /v1/models; None where there is no such list."""
        reply = await self.send("GET", "/v1/models")
        entries = reply.body.get("data") if isinstance(reply.body, dict) else None
        return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else None

    def _headers(self, as_admin: bool) -> dict[str, str]:
        key = self._admin_key if as_admin else self._key
        return {"authorization": f"Bearer {key}"} if key else {}


async def _has_piece(pieces: AsyncIterator[bytes]) -> bool:
    async for piece in pieces:
        if piece:
            return True
    return False


def _reply(response: httpx.Response, seconds: float) -> Reply:
    try:
        body = response.json()
    except ValueError:
        body = None
    error = body.get("error", body.get("detail")) if isinstance(body, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return Reply(
        response.status_code, str(text or response.text), seconds, body, response.headers.get("retry-after")
    )
