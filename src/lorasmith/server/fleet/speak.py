"""An ASGI application asked from within its process, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from lorasmith.server.guard import App, Message


async def speak(app: App, path: str, body: bytes, headers: dict[str, str]) -> AsyncGenerator[Any, None]:
    """POST to `path`: (status, headers) first, then the body's pieces. Who stops listening has hung up."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    asked, gone = asyncio.Queue[Message](), asyncio.Event()
    asked.put_nowait({"type": "http.request", "body": body, "more_body": False})

    async def receive() -> Message:
        if not asked.empty():
            return asked.get_nowait()
        await gone.wait()
        return {"type": "http.disconnect"}

    scope: Message = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()],
        "client": None, "server": None, "state": {},
    }  # fmt: skip
    task = asyncio.ensure_future(app(scope, receive, sent.put))
    task.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                fields = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in message["headers"]}
                yield message["status"], fields
            elif message.get("body"):
                yield bytes(message["body"])
        await task  # raises what the application raised
    finally:
        gone.set()  # and the application ends by itself
