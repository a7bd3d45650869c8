"""What an answer used, read while it passes by."""

from __future__ import annotations

import json
from typing import Any

NO_CHOICES = b'"choices": []'  # within a text the quotes would be escaped


class Meter:
    """Passes a stream's events on as they are, except the usage event where the client did not ask for it.

    Replicas are always asked for that event: it is how the ingress learns what to charge.
    """

    def __init__(self, *, wants_usage: bool) -> None:
        self._wants_usage = wants_usage
        self._rest = b""
        self.used_tokens: int | None = None
        self.events = 0
        self.ending: str | None = None  # "ok" or "failed", once the last event was seen

    def feed(self, piece: bytes) -> bytes:
        """What of it to pass on; an event that is not whole waits."""
        *events, self._rest = (self._rest + piece).split(b"\n\n")
        return b"".join(event + b"\n\n" for event in events if self._passes(event))

    def read(self, body: bytes) -> None:
        """A whole answer."""
        self._note(json.loads(body).get("usage"))
        self.ending = "ok"

    def _passes(self, event: bytes) -> bool:
        self.events += 1
        if event == b"data: [DONE]":
            self.ending = "ok"
        elif event.startswith(b'data: {"error"'):
            self.ending = "failed"
        if NO_CHOICES not in event:
            return True
        self._note(json.loads(event.removeprefix(b"data: ")).get("usage"))
        return self._wants_usage

    def _note(self, usage: dict[str, Any] | None) -> None:
        if usage is not None:
            self.used_tokens = int(usage["total_tokens"])
