"""A socket and signals around an ingress and its local workers."""

from __future__ import annotations

import os
from collections.abc import Callable

from lorasmith.bases import load_tokenizer
from lorasmith.server.fleet.app import create_fleet_app
from lorasmith.server.fleet.ingress import Ingress
from lorasmith.server.fleet.worker import WorkerSpec
from lorasmith.server.fleet.workers import Workers
from lorasmith.server.keys import Keys
from lorasmith.server.run import check_exposure, run_app
from lorasmith.store import Store


def run_fleet(
    spec: WorkerSpec,
    count: int,
    *,
    keys: Keys,
    host: str,
    port: int,
    insecure: bool = False,
    on_ray: int | None = None,
    on_start: Callable[[str], None] = print,
) -> None:
    """Serve with `count` workers until SIGTERM or SIGINT; then drain. A second signal stops at once.

    The address answers once the workers are ready.

    Args:
        on_ray: the workers are replicas of Ray Serve, and may become so many.
    """
    local_only = check_exposure(host, keys, insecure=insecure) and keys.is_open
    if on_ray is not None:
        from lorasmith.server.on_ray import make, run_on_ray  # Ray is an extra

        made = make(spec, count, most=on_ray, keys=keys, local_only=local_only)
        run_on_ray(made, host=host, port=port, on_start=on_start)
        return
    ingress = make_ingress(spec, count, keys=keys)
    app = create_fleet_app(ingress, local_only=local_only)
    run_app(app, ingress, host=host, port=port, on_start=on_start)


def make_ingress(spec: WorkerSpec, count: int, *, keys: Keys) -> Ingress:
    """An ingress before `count` local workers that share this machine's cores."""
    facts = spec.facts()  # a base that is not there is told before any worker starts
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))) // count)
    rows, lookahead = spec.options.get("max_rows", 16), spec.config.lookahead_rows
    pool = Workers(spec, count, rows=rows, lookahead=lookahead, threads=threads)
    store = Store(spec.store, actor="serve")
    return Ingress(pool, store, spec.config, keys=keys, tokenizer=load_tokenizer(spec.base), facts=facts)
