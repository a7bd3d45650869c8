"""What an ingress asks of its replicas, whatever carries the requests."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from lorasmith.errors import UnavailableError
from lorasmith.server.keys import Tenant
from lorasmith.server.names import Resolved

ASKED = "x-lorasmith-asked"  # only replicas read it, and only their ingress can reach them
DIGEST = "x-lorasmith-adapter-digest"


class ReplicaLostError(UnavailableError):
    """A replica went away, or drains, before it gave anything: another one may be asked."""

    def __init__(self, replica: str, why: str) -> None:
        super().__init__(f"replica {replica}: {why}")
        self.replica = replica


@dataclass(frozen=True)
class Call:
    """A request that was let in.

    Attributes:
        rows: choices wanted. tokens: prompts, and answers at their longest, as far as they are known.
    """

    path: str
    body: bytes
    tenant: Tenant
    resolved: Resolved
    request_id: str
    rows: int
    tokens: int
    is_streamed: bool
    wants_usage: bool

    @property
    def opening_events(self) -> int:
        """Events before a stream's first word: a chat names the role of each choice."""
        return self.rows if self.path.endswith("/chat/completions") else 0

    def headers(self) -> dict[str, str]:
        """For the replica: who asks and what was resolved. Rates are the ingress's business alone."""
        tenant = replace(self.tenant, requests_per_minute=None, tokens_per_minute=None)
        asked = {"tenant": asdict(tenant), "resolved": asdict(self.resolved)}
        return {
            "content-type": "application/json", "x-request-id": self.request_id,
            ASKED: json.dumps(asked),
        }  # fmt: skip


def read_asked(header: str) -> tuple[Tenant, Resolved]:
    """The other end of `Call.headers`."""
    values: dict[str, Any] = json.loads(header)
    tenant = values["tenant"] | {"adapters": tuple(values["tenant"]["adapters"])}
    return Tenant(**tenant), Resolved(**values["resolved"])


@dataclass
class Reply:
    """What a replica answers. `close` must follow, however it ends."""

    replica: str
    status: int
    headers: dict[str, str]
    chunks: AsyncIterator[bytes]
    close: Callable[[], Awaitable[None]]


class Pool(Protocol):
    """The replicas. They call `on_change` when there is more or less room."""

    on_change: Callable[[], None]

    @property
    def rows(self) -> int:
        """Requests that may run at once on all that are ready."""

    def why_not_ready(self) -> str | None:
        """None if at least one replica takes requests."""

    async def start(self) -> None:
        """Begin."""

    async def ask(self, call: Call, avoid: Collection[str]) -> Reply:
        """Choose a replica and send.

        Raises:
            ReplicaLostError: it went away before it answered. UnavailableError: none is ready.
        """

    async def metrics(self) -> dict[str, str]:
        """What each replica counts, in Prometheus' format."""

    def status(self) -> list[dict[str, Any]]:
        """One entry for each replica."""

    async def close(self, timeout_s: float) -> None:
        """Let the replicas end."""
