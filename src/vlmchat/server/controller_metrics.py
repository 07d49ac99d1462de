"""What the controller counts, in Prometheus' form. Called by the controller's `/metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vlmchat.server.registry import Worker


class Counts(Protocol):
    """The controller's counters since it started."""

    requests: int
    failovers: int
    failed: int


def exposition(counts: Counts, workers: Sequence[Worker], under_way: int) -> bytes:
    """The page that Prometheus reads."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Now(counts, workers, under_way))
    return generate_latest(registry)


class _Now(Collector):
    def __init__(self, counts: Counts, workers: Sequence[Worker], under_way: int) -> None:
        self._counts, self._workers, self._under_way = counts, workers, under_way

    def collect(self) -> list[Metric]:
        counts = self._counts
        families: list[Metric] = [
            _counter("requests", "Requests for answers.", counts.requests),
            _counter("failovers", "Times that an answer went to another worker.", counts.failovers),
            _counter("request_failure", "Requests that ended in an error.", counts.failed),
            _gauge("num_requests_running", "Answers under way.", self._under_way),
        ]
        healthy = GaugeMetricFamily(
            "vlmchat_worker_healthy", "Whether it gets requests.", labels=("worker",)
        )
        queue = GaugeMetricFamily(
            "vlmchat_worker_queue_length", "Requests that run or wait there.", labels=("worker",)
        )
        for worker in self._workers:
            healthy.add_metric((worker.name,), float(worker.healthy))
            queue.add_metric((worker.name,), worker.queue_length)
        return [*families, healthy, queue]


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"vlmchat_controller_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"vlmchat_controller_{name}", text, value=value)
