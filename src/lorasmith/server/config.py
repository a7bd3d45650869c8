"""The server's limits, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerConfig:
    """Every limit of the server.

    Attributes:
        base_id: what the plain base is called as a `model`.
        default_max_tokens: of an answer whose request names none (or what the context leaves).
        max_choices: prompts times `n` of one request.
        max_waiting: requests that may wait, over all tenants; then 429.
        max_waiting_per_tenant: the same for one tenant.
        lookahead_rows: requests handed to the engine beyond its rows, so that a freed row is filled at once.
        request_timeout_s: from arrival to the last token; then 504.
        body_timeout_s: for a request's body to arrive.
        drain_s: how long running requests may finish after SIGTERM.
        max_silence_s: how old the engine's heartbeat may be while the server calls itself ready.
        max_adapters: adapters known to the engine at once; the least recently used idle one leaves.
        allow_base_mismatch: serve adapters that were trained on another base.
        shadow_share: share of requests that are run again alone and compared.
        shadow_queue: comparisons that may wait; more are skipped and counted.
    """

    base_id: str
    default_max_tokens: int = 512
    max_choices: int = 8
    max_waiting: int = 256
    max_waiting_per_tenant: int = 64
    lookahead_rows: int = 2
    request_timeout_s: float = 600.0
    body_timeout_s: float = 30.0
    max_body_bytes: int = 2 << 20
    max_upload_bytes: int = 2 << 30
    drain_s: float = 30.0
    max_silence_s: float = 60.0
    max_adapters: int = 512
    allow_base_mismatch: bool = False
    shadow_share: float = 0.0
    shadow_queue: int = 64
