"""Prometheus metrics. Labels are names that the store knows, so a client cannot make new ones."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from lorasmith.server.gateway import Gateway

ADAPTER = ("adapter", "version")
FIRST_TOKEN_S = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30)
PER_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What the server counts."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        r = self.registry = CollectorRegistry()
        self.requests = Counter(
            "lorasmith_requests", "Requests that ended, by how.", (*ADAPTER, "outcome"), registry=r
        )
        self.refused = Counter("lorasmith_refused", "Requests that were not let in.", ("status",), registry=r)
        self.prompt_tokens = Counter("lorasmith_prompt_tokens", "Tokens of prompts.", ADAPTER, registry=r)
        self.reused_tokens = Counter(
            "lorasmith_reused_tokens", "Prompt tokens whose keys and values were reused.", ADAPTER, registry=r
        )
        self.generated_tokens = Counter(
            "lorasmith_generated_tokens", "Tokens of answers.", ADAPTER, registry=r
        )
        self.first_token_s = Histogram(
            "lorasmith_time_to_first_token_seconds", "From arrival to the first token of a streamed answer.",
            ADAPTER, registry=r, buckets=FIRST_TOKEN_S,
        )  # fmt: skip
        self.per_token_s = Histogram(
            "lorasmith_time_per_output_token_seconds", "Between tokens of a streamed answer, on average.",
            ADAPTER, registry=r, buckets=PER_TOKEN_S,
        )  # fmt: skip
        self.queue_s = Histogram("lorasmith_queue_seconds", "Waiting for a turn.", registry=r)
        self.isolation_checks = Counter(
            "isolation_checks", "Answers computed again alone.", ("outcome",), registry=r
        )
        self.isolation_mismatch = Counter(
            "isolation_mismatch", "Answers that were another one when computed alone.", registry=r
        )
        self.ready = Gauge("lorasmith_ready", "1 while the server calls itself ready.", registry=r)

    def watch(self, gateway: Gateway) -> None:
        """Also report what the engine and the queue know."""
        self.registry.register(_Live(gateway))

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


class _Live:
    """Read when somebody asks."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterator[Metric]:
        g = self._gateway
        yield _gauge("lorasmith_running_rows", "Rows that the engine was given.", g.queue.running_rows)
        yield _gauge("lorasmith_waiting_requests", "Requests that wait for a turn.", g.queue.waiting)
        yield _gauge("lorasmith_loaded_adapters", "Adapters that the engine knows.", len(g.adapters.loaded))
        yield _gauge("lorasmith_heartbeat_age_seconds", "Since the engine's last step.", g.heartbeat_age_s)
        yield _gauge(
            "lorasmith_engine_restarts", "Times the engine's loop was started again.", g.engine.restarts
        )
        yield from self._slots()
        yield from self._gateway_protocol()

    def _slots(self) -> Iterable[Metric]:
        """A request that found its adapter in the active slots is a hit; each write of a slot is a miss."""
        hits = CounterMetricFamily("lorasmith_slot_hits", "Adapter was in its slot.", labels=ADAPTER)
        misses = CounterMetricFamily(
            "lorasmith_slot_misses", "Adapter was written to a slot.", labels=ADAPTER
        )
        writes = dict(self._gateway.engine.runner.slots.writes_by_digest)
        for (name, version, digest), admitted in self._gateway.admitted.items():
            missed = min(admitted, writes.get(digest, 0))
            hits.add_metric((name, version), admitted - missed)
            misses.add_metric((name, version), writes.get(digest, 0))
        return hits, misses

    def _gateway_protocol(self) -> Iterable[Metric]:
        """As the Kubernetes inference gateway reads it: labels hold the names, the value is the time.

        Its default asks for vLLM's name of the metric; both are here.
        """
        running, waiting = self._gateway.adapters_in_use()
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        values = (str(self._gateway.max_active_adapters), ",".join(running), ",".join(waiting))
        for name in ("lora_requests_info", "vllm:lora_requests_info"):
            family = GaugeMetricFamily(name, "Adapters that run and wait.", labels=labels)
            family.add_metric(values, time.time())
            yield family


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(name, about, value=value)
