"""What a worker counts and measures, in Prometheus' form.

Names are those of vLLM's metrics with our prefix, units included, so that dashboards carry over.
Called by the worker; knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vlmchat.request import Load, Usage

_FIRST_TOKEN_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 20, 40, 80)
_TOKEN_S = (0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_REQUEST_S = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One worker's metrics.

    load() gives what the backend counts itself, where it does.
    """

    def __init__(self, model: str, load: Callable[[], Load | None]) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        self.running = self._gauge("num_requests_running", "Answers under way.")
        self.waiting = self._gauge("num_requests_waiting", "Requests that wait for their turn.")
        self.first_token_s = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_S
        )
        self.token_s = self._histogram(
            "inter_token_latency_seconds", "Between two pieces of an answer.", _TOKEN_S
        )
        self.request_s = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST_S
        )
        self.queue_s = self._histogram(
            "request_queue_time_seconds", "From arrival to one's turn.", _REQUEST_S
        )
        self.prefill_s = self._histogram(
            "request_prefill_time_seconds", "From one's turn to the first token.", _REQUEST_S
        )
        self.decode_s = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", _REQUEST_S
        )
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts, those of pictures too.")
        self._generated = self._counter("generation_tokens", "Tokens of answers.")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found, not computed again.")
        self._finished = Counter(
            "vlmchat_request_success",
            "Answers that ended, by reason.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._failed = Counter(
            "vlmchat_request_failure",
            "Requests that did not end with an answer, by error code.",
            ("model_name", "code"),
            registry=self._registry,
        )
        self._registry.register(_LoadCollector(model, load))

    def answered(self, usage: Usage, reason: str) -> None:
        """Count one answer and its tokens."""
        self._prompt.inc(usage.prompt_tokens)
        self._generated.inc(usage.completion_tokens)
        self._queries.inc(usage.prompt_tokens)
        self._hits.inc(usage.cached_tokens)
        self._finished.labels(self._model, reason).inc()

    def failed(self, code: str) -> None:
        """Count one request that got no answer, or not all of it."""
        self._failed.labels(self._model, code).inc()

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vlmchat_{name}", text, ("model_name",), registry=self._registry).labels(
            self._model
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vlmchat_{name}", text, ("model_name",), registry=self._registry).labels(
            self._model
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"vlmchat_{name}", text, ("model_name",), registry=self._registry, buckets=buckets
        ).labels(self._model)


class _LoadCollector(Collector):
    """The backend's own figures, read when somebody looks."""

    def __init__(self, model: str, load: Callable[[], Load | None]) -> None:
        self._model, self._load = model, load

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        if load is None:
            return
        gauges = {"num_sequences_running": load.running, "num_sequences_waiting": load.waiting}
        counters = {
            "mm_cache_queries": load.images,
            "mm_cache_hits": load.images_cached,
            "spec_decode_num_draft_tokens": load.drafted,
            "spec_decode_num_accepted_tokens": load.accepted,
        }
        for name, value in gauges.items():
            gauge = GaugeMetricFamily(f"vlmchat_{name}", "In the engine.", labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        usage = GaugeMetricFamily(
            "vlmchat_kv_cache_usage_perc", "Slots in use, 1 is all.", labels=["model_name"]
        )
        usage.add_metric([self._model], load.running / max(load.slots, 1))
        yield usage
        for name, value in counters.items():
            counter = CounterMetricFamily(
                f"vlmchat_{name}", "In the engine.", labels=["model_name"]
            )
            counter.add_metric([self._model], value)
            yield counter
