"""A socket and signals around the application."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
import socket
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Protocol

import uvicorn

from lorasmith.errors import ConfigError, OutputError
from lorasmith.server.app import create_app
from lorasmith.server.fairness import FairQueue
from lorasmith.server.gateway import Gateway
from lorasmith.server.guard import App
from lorasmith.server.keys import Keys
from lorasmith.server.logs import log_to_stderr

KEEP_ALIVE_S = 30
log = logging.getLogger("lorasmith.server")


def check_exposure(host: str, keys: Keys, *, insecure: bool) -> bool:
    """Whether only this machine can reach `host`.

    Raises:
        ConfigError: others can, and there are no keys.
    """
    is_local = _is_loopback(host)
    if not is_local and keys.is_open and not insecure:
        raise ConfigError(
            f"--host {host} is reachable from other machines, and there are no keys.\n"
            "  give --keys FILE (lorasmith key makes a key), or --insecure if that is really meant."
        )
    return is_local


def check_address(host: str, port: int) -> None:
    """Before a base is loaded for nothing.

    Raises:
        OutputError: the address cannot be listened on.
    """
    _bind(host, port).close()


def free_port(host: str) -> int:
    """One that nobody listens on now; for servers that cannot choose one themselves."""
    with _bind(host, 0) as bound:
        port: int = bound.getsockname()[1]
        return port


def run(
    gateway: Gateway, *, host: str, port: int, insecure: bool = False, on_start: Callable[[str], None] = print
) -> None:
    """Serve until SIGTERM or SIGINT; then drain. A second signal stops at once.

    Raises:
        ConfigError: the host is reachable from elsewhere, without keys.
        OutputError: the address cannot be used.
    """
    local_only = check_exposure(host, gateway.keys, insecure=insecure) and gateway.keys.is_open
    run_app(create_app(gateway, local_only=local_only), gateway, host=host, port=port, on_start=on_start)


class Drainable(Protocol):
    """What a signal ends."""

    is_draining: bool

    @property
    def queue(self) -> FairQueue:
        """Who runs and waits."""

    async def drain(self) -> None:
        """Let in nobody new, and wait for who runs."""


def run_app(app: App, front: Drainable, *, host: str, port: int, on_start: Callable[[str], None]) -> None:
    """Serve any application as `run` does."""
    bound = _bind(host, port)
    address = f"[{host}]" if ":" in host else host
    run_on(bound, app, front, on_start=lambda: on_start(f"http://{address}:{bound.getsockname()[1]}"))


def run_on(bound: socket.socket, app: App, front: Drainable, *, on_start: Callable[[], None]) -> None:
    """Serve on a socket that is bound already."""
    log_to_stderr()
    _raise_file_limit()
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=5,
    )
    _Server(config, front, on_start).run(sockets=[bound])


class _Server(uvicorn.Server):
    """Drains before it closes anything."""

    def __init__(self, config: uvicorn.Config, front: Drainable, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._front = front
        self._on_start = on_start
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the next one stops."""
        if self._loop is None or self._front.is_draining:
            super().handle_exit(sig, frame)
            return
        self._front.is_draining = True
        self._loop.call_soon_threadsafe(self._begin_draining)

    def _begin_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        log.info("draining", extra={"fields": {"running_rows": self._front.queue.running_rows}})
        await self._front.drain()
        self.should_exit = True


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with ExitStack() as on_failure:
            bound = on_failure.enter_context(socket.socket(family, socket.SOCK_STREAM))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, port))
            on_failure.pop_all()
    except (OSError, OverflowError) as error:
        raise OutputError(f"{host}:{port} cannot be listened on: {error}. Choose another --port.") from error
    return bound


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _raise_file_limit() -> None:
    """Each loaded adapter holds a lease, each client a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
