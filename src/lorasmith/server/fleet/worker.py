"""One replica as a process: a gateway on a Unix socket that only its ingress can open.

    python -m lorasmith.server.fleet.worker < spec

The first line of standard input is the specification; when standard input ends, the ingress is gone and the
worker ends too.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.bases import base_directory, load_base
from lorasmith.engine import Engine
from lorasmith.errors import LoraSmithError
from lorasmith.server.app import create_api
from lorasmith.server.config import ServerConfig
from lorasmith.server.fleet.pool import ASKED, read_asked
from lorasmith.server.gateway import Gateway
from lorasmith.server.guard import App, Guard, Message
from lorasmith.server.keys import Keys, Principal
from lorasmith.server.logs import log_to_stderr
from lorasmith.server.run import run_on
from lorasmith.store import BaseFacts, Store, base_facts

log = logging.getLogger("lorasmith.server")


@dataclass(frozen=True)
class WorkerSpec:
    """How every replica is made.

    Attributes:
        options: of the `Engine`. config: of the server.
    """

    base: str
    dtype: str
    store: str
    config: ServerConfig
    options: dict[str, Any] = field(default_factory=dict)
    quantize: str | None = None

    def to_json(self) -> str:
        """On one line."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> WorkerSpec:
        """The other end of `to_json`."""
        values = json.loads(text)
        return cls(**values | {"config": ServerConfig(**values["config"])})

    def facts(self) -> BaseFacts:
        """What an adapter must fit.

        Raises:
            BaseNotFoundError: there is no such base.
        """
        mismatch = self.config.allow_base_mismatch
        directory = base_directory(self.base)
        return base_facts(directory, self.config.base_id, quantize=self.quantize, allow_mismatch=mismatch)

    def gateway(self) -> Gateway:
        """Load the base and what aliases point to."""
        base = load_base(self.base, dtype=self.dtype, quantize=self.quantize)
        store = Store(self.store, actor="serve")
        reference = Engine(base, **self.options, prefix_cache_bytes=0) if self.config.shadow_share else None
        gateway = Gateway(base, Engine(base, **self.options), store, self.config, reference=reference)
        gateway.adapters.preload(_report)
        return gateway


def _report(alias: str, error: LoraSmithError | None) -> None:
    if error is not None:
        log.warning("adapter not served", extra={"fields": {"alias": alias, "error": str(error)}})


class Believing(Guard):
    """Takes from its ingress who asks and what that means; a replica resolves no name and knows no key."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(create_api(gateway), keys=Keys(), config=gateway.config, local_only=False)

    async def _check(self, scope: Message, headers: dict[str, str]) -> None:
        state = scope["state"]
        state["principal"] = Principal("tenant")
        if ASKED in headers:
            tenant, state["resolved"] = read_asked(headers[ASKED])
            state["principal"] = Principal("tenant", tenant)


def worker_app(gateway: Gateway) -> App:
    """The application that a replica runs."""
    return Believing(gateway)


def main() -> None:
    """Serve until SIGTERM, or until standard input ends."""
    log_to_stderr()
    spec = WorkerSpec.of(sys.stdin.readline())
    path = Path(sys.stdin.readline().strip())
    gateway = spec.gateway()
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound.bind(str(path))
    path.chmod(0o600)
    threading.Thread(target=_end_with_ingress, daemon=True).start()
    run_on(bound, worker_app(gateway), gateway, on_start=lambda: None)


def _end_with_ingress() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
