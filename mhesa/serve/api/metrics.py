"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from mhesa.serve.engine.decode_thread import DecodeThread
from mhesa.serve.sessions import SessionError, Sessions

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKEN_BUCKETS = tuple(bound / 100 for bound in BUCKETS)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """A server's figures; those of the decode thread and of the sessions are read when they are asked for."""

    def __init__(self, engine: DecodeThread, sessions: Sessions) -> None:
        self._engine, self._sessions = engine, sessions
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.requests = Counter(
            "mhesa_requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        histogram = partial(Histogram, buckets=BUCKETS, registry=self.registry)
        self.seconds = histogram(
            "mhesa_request_seconds", "From a request to the end of its answer.", ["route"]
        )
        self.first_token = histogram(
            "mhesa_time_to_first_token_seconds", "From a request to its first token."
        )
        self.per_token = histogram(
            "mhesa_time_per_token_seconds",
            "Mean time from a text's token to its next.",
            buckets=TOKEN_BUCKETS,
        )

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """The figures of the decode thread and, while their file can be used, of the sessions."""
        engine = self._engine
        yield from (
            GaugeMetricFamily("mhesa_texts_active", "Texts being written.", engine.active),
            GaugeMetricFamily("mhesa_prompts_reading", "Prompts being read.", engine.reading),
            GaugeMetricFamily("mhesa_texts_waiting", "Texts that wait for a slot.", engine.waiting),
            GaugeMetricFamily("mhesa_slots", "Texts that can be written at once.", engine.size),
            GaugeMetricFamily(
                "mhesa_state_bytes", "States of texts being written.", engine.active * engine.state_bytes
            ),
            CounterMetricFamily("mhesa_prompt_tokens", "Prompt tokens read.", engine.tokens_read),
            CounterMetricFamily("mhesa_generated_tokens", "Tokens written.", engine.tokens_written),
            CounterMetricFamily("mhesa_steps", "Steps of the decode thread.", engine.steps),
            CounterMetricFamily("mhesa_failed_jobs", "Jobs that failed by a fault.", engine.failures),
        )
        try:
            sessions, session_bytes = self._sessions.size()
        except SessionError:
            return
        yield GaugeMetricFamily("mhesa_sessions", "Stored sessions.", sessions)
        yield GaugeMetricFamily("mhesa_session_bytes", "States of stored sessions.", session_bytes)
