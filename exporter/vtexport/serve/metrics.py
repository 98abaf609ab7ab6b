"""What a server counts, in Prometheus' form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vtexport.pruning import PruningPlan

if TYPE_CHECKING:
    from vtexport.serve.scheduler import Scheduler

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.outcomes = Counter(
            "vtexport_requests",
            "Requests by how they ended: answered, refused, rejected (no place), cancelled, timeout, failed.",
            ["outcome"],
            registry=registry,
        )
        self._waiting = Gauge("vtexport_requests_waiting", "Requests that wait for a slot.", registry=registry)
        self._decoding = Gauge("vtexport_requests_running", "Requests that have a slot.", registry=registry)
        self.prompt_tokens = Counter(
            "vtexport_prompt_tokens",
            "Text tokens of prompts and the visual tokens that entered the decoder.",
            registry=registry,
        )
        self._generated = Counter("vtexport_generated_tokens", "Tokens of answers.", registry=registry)
        self._visual = Counter(
            "vtexport_visual_tokens",
            "Visual tokens: total as the vision tower gave them, kept as their mean over the decoder's layers.",
            ["which"],
            registry=registry,
        )
        self.first_token = Histogram(
            "vtexport_time_to_first_token_seconds",
            "From the prepared request to its first token, waiting included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._per_token = Histogram(
            "vtexport_time_per_output_token_seconds",
            "Mean time of an answer's further tokens.",
            buckets=_PER_TOKEN,
            registry=registry,
        )
        for outcome in ("answered", "refused", "rejected", "cancelled", "timeout", "failed"):
            self.outcomes.labels(outcome)

    def watch(self, scheduler: Scheduler) -> None:
        """Read the gauges from `scheduler` whenever they are asked for."""
        self._waiting.set_function(lambda: scheduler.waiting)
        self._decoding.set_function(lambda: scheduler.decoding)

    def looked(self, plan: PruningPlan, rows: int) -> None:
        """Count the visual tokens of `rows` prompts under `plan`."""
        self._visual.labels("total").inc(rows * plan.num_visual_tokens)
        self._visual.labels("kept").inc(rows * plan.mean_visual_tokens)

    def answered(self, tokens: int, seconds: float) -> None:
        """Count an answer of `tokens` tokens, which took `seconds` behind the first."""
        self.outcomes.labels("answered").inc()
        self._generated.inc(tokens)
        if tokens > 1:
            self._per_token.observe(seconds / (tokens - 1))

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
