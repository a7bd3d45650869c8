"""The Ray Serve application, and `lorasmith serve --engine ray` around it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from lorasmith.bases import load_tokenizer
from lorasmith.errors import EngineError
from lorasmith.server.config import ServerConfig
from lorasmith.server.fleet.app import create_fleet_app
from lorasmith.server.fleet.ingress import Ingress
from lorasmith.server.fleet.worker import WorkerSpec
from lorasmith.server.guard import App, Message, Receive, Send
from lorasmith.server.keys import Keys, read_keys
from lorasmith.server.logs import log_to_stderr
from lorasmith.server.on_ray.pool import RayPool
from lorasmith.server.on_ray.replica import Replica
from lorasmith.server.on_ray.router import Chosen
from lorasmith.server.run import free_port
from lorasmith.store import Store

NAME = "lorasmith"
MANY = 1_000_000  # the ingress has its own limits, and replicas are asked how they are even when full
HEALTH_S = 5.0
UPSCALE_S = 10.0  # a queue that lasts so long gets one more replica
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)  # the ingress has its own log of requests


class Front:
    """The ingress as a deployment. One replica only: quotas and turns are kept in its memory."""

    def __init__(
        self,
        replicas: Any,
        spec: str,
        keys: Keys,
        room: int,
        most: int,
        local_only: bool,
    ) -> None:
        log_to_stderr()
        made = WorkerSpec.of(spec)
        pool = RayPool(replicas, room=room, most=most)
        store = Store(made.store, actor="serve")
        self.ingress = Ingress(
            pool, store, made.config, keys=keys, tokenizer=load_tokenizer(made.base), facts=made.facts()
        )
        self._local_only = local_only

    def __serve_build_asgi_app__(self) -> Any:
        """Where Ray asks for the application."""
        return without_id(create_fleet_app(self.ingress, local_only=self._local_only))

    async def drain(self) -> None:
        """Let in nobody new, and wait for who runs."""
        await self.ingress.drain()

    async def why_not_ready(self) -> str | None:
        """Why no request should be sent yet."""
        return self.ingress.why_not_ready()


def without_id(app: App) -> App:
    """Ray's proxy adds the request's id to every answer itself, the one that it gave the request."""

    async def inner(scope: Message, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
                message = {**message, "headers": kept}
            await send(message)

        await app(scope, receive, sent)

    return inner


def make(spec: WorkerSpec, count: int, *, most: int | None = None, keys: Keys, local_only: bool) -> Any:
    """The application: `count` replicas, or by the length of the queue up to `most`.

    A replica reserves as many of Ray's CPUs as it has threads.
    """
    most = max(count, most or count)
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // most)
    rows = spec.options.get("max_rows", 16)
    room = rows + spec.config.lookahead_rows
    number: dict[str, Any] = {"num_replicas": count}
    if most > count:
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=count, max_replicas=most, target_ongoing_requests=rows, upscale_delay_s=UPSCALE_S
            )
        }
    replicas = serve.deployment(Replica).options(
        name="Replica",
        logging_config=QUIET,
        max_ongoing_requests=MANY,
        graceful_shutdown_timeout_s=spec.config.drain_s,
        health_check_period_s=HEALTH_S,
        ray_actor_options={
            "num_cpus": threads, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        },
        request_router_config=RequestRouterConfig(request_router_class=Chosen),
        **number,
    )  # fmt: skip
    front = serve.deployment(serve.ingress()(Front)).options(
        name="Front",
        logging_config=QUIET,
        num_replicas=1,
        max_ongoing_requests=MANY,
        graceful_shutdown_timeout_s=spec.config.drain_s,
        ray_actor_options={"num_cpus": 0},
    )
    text = spec.to_json()
    return front.bind(replicas.bind(text), text, keys, room, most, local_only)


def application(settings: Mapping[str, Any]) -> Any:
    """For `serve deploy`: `import_path: lorasmith.server.on_ray:application`.

    Args:
        settings: `base` and `store`, which every node must see; if wanted `keys` (a file), `dtype`, `quantize`, `workers`,
            `max_workers`, `config` (fields of `ServerConfig`) and `options` (of `Engine`).
    """
    base = str(settings["base"])
    config = ServerConfig(
        **{"base_id": os.path.basename(base), "playground": False} | settings.get("config", {})
    )
    spec = WorkerSpec(
        base,
        settings.get("dtype", "auto"),
        settings["store"],
        config,
        settings.get("options", {}),
        settings.get("quantize"),
    )
    keys = read_keys(settings["keys"]) if settings.get("keys") else Keys()
    most = settings.get("max_workers")
    return make(spec, settings.get("workers", 1), most=most, keys=keys, local_only=keys.is_open)


def run_on_ray(made: Any, *, host: str, port: int, on_start: Callable[[str], None] = print) -> None:
    """Serve an application of `make` until SIGTERM or SIGINT; then drain.

    Joins the cluster at RAY_ADDRESS, or starts one of its own.

    Raises:
        EngineError: Ray could not bring the application up.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    port = port or free_port(host)
    ray.init(include_dashboard=False, log_to_driver=True, logging_level="WARNING", ignore_reinit_error=True)
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=QUIET)
        try:
            front = serve.run(made, name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise EngineError(f"Ray Serve could not start the server: {error}") from error
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())  # Ray took them
        while front.why_not_ready.remote().result() is not None and not stop.is_set():
            stop.wait(0.2)
        on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        stop.wait()
        front.drain.remote().result()
        serve.delete(NAME)
    finally:
        if not os.environ.get("RAY_ADDRESS"):
            serve.shutdown()
        ray.shutdown()
