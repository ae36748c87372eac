"""`Metrics`: what ``/metrics`` tells Prometheus.

Exits are counted per token of texts and per row of one-pass models; the shares of
``edgeexit_exits_total`` are the exit histogram.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

from edgeexit.runtime import Generation
from edgeexit.serve.jobs import Jobs

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counts of one server.

    Args:
        exits: Names of the exits that answer.
        about: Labels of ``edgeexit_info``.
    """

    def __init__(self, exits: Sequence[str], about: Mapping[str, str]) -> None:
        own = self._registry = CollectorRegistry()
        ProcessCollector(registry=own)
        Info("edgeexit", "What is served.", registry=own).info(dict(about))
        self.requests = Counter(
            "edgeexit_requests", "Requests.", ["endpoint", "status"], registry=own
        )
        self.seconds = Histogram(
            "edgeexit_request_seconds",
            "Seconds from a request's arrival to the end of its answer.",
            ["endpoint"],
            registry=own,
            buckets=_SECONDS,
        )
        self.queue_seconds = Histogram(
            "edgeexit_queue_seconds",
            "Seconds that requests waited for the model.",
            registry=own,
            buckets=_SECONDS,
        )
        self._waiting = Gauge("edgeexit_queue_length", "Requests that wait.", registry=own)
        self._running = Gauge("edgeexit_running", "Requests that the model runs.", registry=own)
        self._exits = Counter(
            "edgeexit_exits", "Tokens or rows by the exit that answered.", ["exit"], registry=own
        )
        for name in exits:
            self._exits.labels(name)
        self._texts = Counter(
            "edgeexit_texts", "Texts by what ended them.", ["reason"], registry=own
        )
        self._tokens = Counter(
            "edgeexit_tokens",
            "Tokens: of prompts, of prompts that were not computed again, new ones.",
            ["kind"],
            registry=own,
        )
        self._first = Histogram(
            "edgeexit_first_token_seconds",
            "Seconds from the beginning of a text's computation to its first token.",
            registry=own,
            buckets=_SECONDS,
        )
        self._decode = Counter(
            "edgeexit_decode_seconds", "Seconds from first tokens to last tokens.", registry=own
        )
        self._drafted = Counter("edgeexit_drafted_tokens", "Drafted tokens.", registry=own)
        self._accepted = Counter(
            "edgeexit_accepted_tokens", "Drafted tokens that were accepted.", registry=own
        )

    def watch(self, jobs: Jobs) -> None:
        """Reads the queue whenever it is asked for."""
        self._waiting.set_function(lambda: jobs.waiting)
        self._running.set_function(lambda: int(jobs.running is not None))

    def count_text(self, made: Generation, prompt_tokens: int, reason: str) -> None:
        """Counts a text that has ended."""
        statistics = made.statistics
        self._texts.labels(reason).inc()
        kinds = {"prompt": prompt_tokens, "reused": made.reused_tokens}
        for kind, count in (kinds | {"new": sum(map(len, made.tokens))}).items():
            self._tokens.labels(kind).inc(count)
        self.count_exits(statistics.exits)
        self._first.observe(made.first_token_s)
        self._decode.inc(made.decode_s)
        self._drafted.inc(statistics.drafted)
        self._accepted.inc(statistics.accepted)

    def count_exits(self, exits: Mapping[str, int]) -> None:
        """Adds tokens or rows per exit."""
        for name, count in exits.items():
            self._exits.labels(name).inc(count)

    def text(self) -> bytes:
        """All of it, in Prometheus' form."""
        return generate_latest(self._registry)


__all__ = ["CONTENT_TYPE", "Metrics"]
