"""Metrics of the whole: the ingress's own, and every replica's with a label that names it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from lorasmith.server.fleet.ingress import Ingress

INFO = "lora_requests_info"
WORKER_INFO = f"lorasmith_worker_{INFO}"


class FleetMetrics:
    """What the ingress counts."""

    def __init__(self, ingress: Ingress) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._ingress = ingress
        r = self.registry = CollectorRegistry()
        self.requests = Counter(
            "lorasmith_fleet_requests", "Requests that ended, by how.", ("outcome",), registry=r
        )
        self.refused = Counter(
            "lorasmith_fleet_refused", "Requests that were not let in.", ("status",), registry=r
        )
        self.retries = Counter(
            "lorasmith_fleet_retries", "Requests sent again: a replica was lost.", registry=r
        )
        self.broken = Counter(
            "lorasmith_fleet_broken_streams", "Streams whose replica went away in the middle.", registry=r
        )
        self.wrong = Counter(
            "lorasmith_fleet_wrong_adapter", "Answers refused: made by another adapter.", registry=r
        )
        self.ready = Gauge("lorasmith_fleet_ready", "1 while the server calls itself ready.", registry=r)

    def text(self, replicas: Mapping[str, str]) -> bytes:
        """In Prometheus' format.

        Args:
            replicas: name → its own metrics.
        """
        self.ready.set(self._ingress.why_not_ready() is None)
        whole = CollectorRegistry()
        whole.register(_Replicas(replicas))
        return generate_latest(self.registry) + self._info() + generate_latest(whole)

    def _info(self) -> bytes:
        """As the Kubernetes inference gateway reads it: the whole as one server.

        It takes the newest sample of the name, whatever its other labels, so those of the replicas have
        another name.
        """
        i, once = self._ingress, CollectorRegistry()
        running = sorted({p.call.resolved.asked for p in i.running if p.call.resolved.digest})
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        values = (str(i.pool.rows), ",".join(running), ",".join(sorted(i.waiting)))
        once.register(_Family([_gauge(name, labels, values) for name in (INFO, f"vllm:{INFO}")]))
        return generate_latest(once)


class _Family:
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


class _Replicas:
    """Families of the same name become one, each sample with its replica's name."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                name = _renamed(family.name)
                if name is None:
                    continue
                one = found.setdefault(name, Metric(name, family.documentation, family.type))
                for s in family.samples:
                    labels = dict(s.labels) | {"worker": replica}
                    one.add_sample(
                        s.name.replace(family.name, name, 1), labels, s.value, s.timestamp, s.exemplar
                    )
        yield from found.values()


def _renamed(name: str) -> str | None:
    return {INFO: WORKER_INFO, f"vllm:{INFO}": None}.get(name, name)


def _gauge(name: str, labels: tuple[str, ...], values: tuple[str, ...]) -> Metric:
    family = GaugeMetricFamily(name, "Adapters that run and wait.", labels=labels)
    family.add_metric(values, time.time())
    return family
