"""What /metrics says, in Prometheus's text form. One registry a server: tests have many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from amx_tvm.server.answer import Answer

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "amx_tvm_requests",
            "Requests that were answered, by route and HTTP status",
            ["route", "status"],
            registry=registry,
        )
        self.finished = Counter(
            "amx_tvm_choices",
            "Answers that ended, by reason: stop, length, cancelled, error",
            ["reason"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "amx_tvm_prompt_tokens",
            "Tokens of prompts, those found in the cache too",
            registry=registry,
        )
        self.generated_tokens = Counter(
            "amx_tvm_generated_tokens", "Tokens that were generated", registry=registry
        )
        self.first_token = Histogram(
            "amx_tvm_time_to_first_token_seconds",
            "From the request's arrival to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "amx_tvm_time_between_tokens_seconds",
            "From one token of a stream to the next",
            buckets=_STEPS,
            registry=registry,
        )
        self.duration = Histogram(
            "amx_tvm_request_duration_seconds",
            "From a request's arrival to its last token",
            buckets=_SECONDS,
            registry=registry,
        )

    def record(self, answer: Answer) -> None:
        """Add an answer that has ended."""
        for reason in answer.reasons:
            self.finished.labels(reason).inc()
        self.prompt_tokens.inc(answer.usage.prompt_tokens)
        self.generated_tokens.inc(answer.usage.completion_tokens)
        if answer.first_token_s is not None:
            self.first_token.observe(answer.first_token_s)
        for gap in answer.gaps:
            self.between_tokens.observe(gap)
        self.duration.observe(answer.seconds)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is asked for when the metrics are read."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def count(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a counter that somebody else counts."""
        self.registry.register(_Counted(name, text, value))

    def text(self) -> bytes:
        """Return all metrics in the text form that Prometheus reads."""
        return generate_latest(self.registry)


class _Counted(Collector):
    """A counter whose value is asked for when the metrics are read."""

    def __init__(self, name: str, text: str, value: Callable[[], float]):
        self._name, self._text, self._value = name, text, value

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self._name, self._text, self._value())
