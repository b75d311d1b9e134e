"""What Prometheus asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from mhesa.serve.engine.loop import Engine
from mhesa.serve.sessions import Sessions

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKEN_BUCKETS = tuple(bound / 100 for bound in BUCKETS)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """A server's figures.

    Args:
        engine, sessions: where they are read when somebody asks.
    """

    def __init__(self, engine: Engine, sessions: Sessions) -> None:
        self._engine, self._sessions = engine, sessions
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.requests = Counter(
            "mhesa_requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "mhesa_request_seconds",
            "From a request to the end of its answer.",
            ["route"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "mhesa_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.per_token = Histogram(
            "mhesa_time_per_token_seconds",
            "Mean time from a text's token to its next.",
            buckets=TOKEN_BUCKETS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def describe(self) -> list[Metric]:
        """Nothing is known in advance."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What the engine and the sessions tell."""
        engine = self._engine
        slots = engine.slots
        sessions, stored = self._sessions.size()
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "mhesa_texts_active": ("Texts being written.", lambda: len(slots.rows)),
            "mhesa_prompts_reading": ("Prompts being read.", lambda: engine.reading),
            "mhesa_texts_waiting": ("Texts that wait for a slot.", lambda: engine.waiting),
            "mhesa_slots": ("Texts that can be written at once.", lambda: slots.most),
            "mhesa_state_bytes": ("States of texts being written.", lambda: len(slots.rows) * slots.bytes),
            "mhesa_sessions": ("Stored sessions.", lambda: sessions),
            "mhesa_session_bytes": ("States of stored sessions.", lambda: stored),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(name, what, value())
        counters = {
            "mhesa_prompt_tokens": ("Prompt tokens read.", engine.tokens_read),
            "mhesa_generated_tokens": ("Tokens written.", engine.tokens_written),
            "mhesa_steps": ("Steps of the decode loop.", engine.steps),
            "mhesa_failed_jobs": ("Jobs that failed by a fault.", engine.failures),
        }
        for name, (what, count) in counters.items():
            yield CounterMetricFamily(name, what, count)
