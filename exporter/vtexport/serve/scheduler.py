"""Continuous batching: one thread runs the engine, and requests join its batch between decode steps.

Requests that wait are prefilled together, as many as there are free slots, and join the rows that decode. Prefill runs whole:
meanwhile, the others wait. Where an engine cannot join batches (TensorRT's lanes are made for one size), requests that
wait are batched when the batch before them has ended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vtexport.errors import NumericError, VtexportError
from vtexport.runtime.batch import Batch
from vtexport.runtime.request import Decoding, Request
from vtexport.runtime.runner import Runner
from vtexport.serve.metrics import Metrics
from vtexport.targets.engine import VisionOutput

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """No more requests are accepted now."""


@dataclass(frozen=True)
class Token:
    """The next token of an answer."""

    token: int


@dataclass(frozen=True)
class End:
    """The end of an answer: `stop` at the model's own end, `length` after the tokens that were asked for."""

    reason: str


@dataclass(frozen=True)
class Failure:
    """The end of a request without an answer: an HTTP status, and one line."""

    status: int
    message: str


Event = Token | End | Failure
_BROKEN = Failure(500, "the engine failed; the server's log says why")


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        request: prompt and images.
        max_new_tokens: at least 1.
        end_tokens: tokens that end the answer.
        deadline: when it is given up, by `time.monotonic()`.
        deliver: called from the engine's thread with every event.
        cancelled: set by whoever no longer wants the answer.
        accepted: when it came.
    """

    request: Request
    max_new_tokens: int
    end_tokens: Sequence[int]
    deadline: float
    deliver: Callable[[Event], None]
    cancelled: bool = False
    accepted: float = field(default_factory=time.monotonic)
    tokens: int = 0
    first: float = 0.0


@dataclass
class _Running:
    """A batch and the job of each of its rows; None for a row that has ended and cannot leave."""

    batch: Batch
    jobs: list[Job | None]


class Scheduler:
    """Answers jobs.

    Args:
        runner: the opened bundle, of which this has the only use from now on.
        slots: rows that decode together at most.
        queue: jobs beyond these that wait, or are being prepared, at most.
        metrics: what is counted.
    """

    def __init__(self, runner: Runner, slots: int, queue: int, metrics: Metrics) -> None:
        self._runner, self._slots, self._queue, self._metrics = runner, slots, queue, metrics
        self._waiting: deque[Job] = deque()
        self._running: list[_Running] = []
        self._joins = True
        self._reserved = 0
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="vtexport-engine", daemon=True)
        metrics.watch(self)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Answer what was accepted, and end."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Jobs that wait for a slot."""
        return len(self._waiting)

    @property
    def decoding(self) -> int:
        """Jobs that have one."""
        return sum(job is not None for running in list(self._running) for job in running.jobs)

    @property
    def taken(self) -> int:
        """Places that `reserve` has given and `release` has not taken back."""
        return self._reserved

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def reserve(self) -> None:
        """Take one of the places, which `release` gives back.

        Raises:
            QueueFull: there is none.
        """
        with self._changed:
            if self._stopping or self._reserved >= self._slots + self._queue:
                raise QueueFull
            self._reserved += 1

    def release(self) -> None:
        """Give back a place that `reserve` took."""
        with self._changed:
            self._reserved -= 1

    def submit(self, job: Job) -> None:
        """Let `job` wait for a slot; a place was reserved for it."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._running:
                    if self._stopping:
                        return
                    self._changed.wait()
                jobs: list[Job | None] = [*self._next()]
            if jobs:
                self._admit(jobs)
            for running in self._running:
                self._guarded(lambda running=running: self._step(running), running.jobs)  # type: ignore[misc]
            self._running = [running for running in self._running if any(running.jobs)]

    def _next(self) -> list[Job]:
        """Jobs that get a slot now."""
        jobs: list[Job] = []
        if self._running and not self._joins:
            return jobs
        free = self._slots - self.decoding
        while self._waiting and len(jobs) < free:
            job = self._waiting.popleft()
            if not self._given_up(job):
                jobs.append(job)
        return jobs

    def _admit(self, jobs: list[Job | None]) -> None:
        """Run the vision graph for `jobs`, and prefill those that got the same plan together."""
        vision = self._guarded(lambda: self._runner.look([job.request for job in jobs if job]), jobs)
        if vision is None:
            return
        chosen = self._runner.buckets(vision)
        for bucket in map(int, np.unique(chosen)):
            rows = np.flatnonzero(chosen == bucket)
            own = [jobs[row] for row in rows]
            self._guarded(lambda own=own, rows=rows, b=bucket: self._prefill(own, vision.rows(rows), b), own)  # type: ignore[misc]

    def _prefill(self, jobs: list[Job | None], vision: VisionOutput, bucket: int) -> None:
        """Run prefill for `jobs`, and let them join a batch."""
        plan, present = self._runner.plans[bucket], [job for job in jobs if job]
        # Each job was checked against the model's positions by itself; the longest of all is not the sum of any.
        decoding = Decoding(max(job.max_new_tokens for job in present), max_positions=1 << 62)
        batch = Batch(self._runner.engine, plan, [job.request for job in present], decoding, vision, bucket)
        self._metrics.looked(plan, len(present))
        if self._joins and self._running:
            try:
                self._joins = self._running[0].batch.join(batch)
            except Exception:
                # Whatever state that left the other rows in, their answers could be wrong from here on.
                self._failed(self._running[0].jobs, _BROKEN)
                raise
            if self._joins:
                self._running[0].jobs += jobs
                return
        self._running.append(_Running(batch, jobs))

    def _step(self, running: _Running) -> None:
        """Deliver a token of every row, and compute the next ones."""
        batch, tokens = running.batch, running.batch.logits.argmax(axis=1)
        for row, job in enumerate(running.jobs):
            if job is not None and batch.faults[row]:
                # The other rows do not depend on this one, and go on.
                self._failed([job], Failure(500, str(NumericError(batch.faults[row]))))
                running.jobs[row] = None
            elif job is not None and self._ended(job, int(tokens[row])):
                running.jobs[row] = None
        staying = np.array([row for row, job in enumerate(running.jobs) if job is not None], dtype=np.int64)
        if not len(staying):
            return
        # A row that has ended has no room for more tokens, unless all rows of the batch have equal room.
        if len(staying) < len(running.jobs) and batch.retain(staying):
            running.jobs, tokens = [running.jobs[row] for row in staying], tokens[staying]
        batch.decode(tokens)

    def _ended(self, job: Job, token: int) -> bool:
        """Deliver `token`; whether that was the last one."""
        if self._given_up(job):
            return True
        now = time.monotonic()
        if not job.tokens:
            job.first = now
            self._metrics.first_token.observe(now - job.accepted)
        job.tokens += 1
        job.deliver(Token(token))
        if token in job.end_tokens:
            reason = "stop"
        elif job.tokens == job.max_new_tokens:
            reason = "length"
        else:
            return False
        self._metrics.answered(job.tokens, now - job.first)
        job.deliver(End(reason))
        return True

    def _given_up(self, job: Job) -> bool:
        """Whether nobody waits for `job` any more; it is told if its time is over."""
        if job.cancelled:
            self._metrics.outcomes.labels("cancelled").inc()
            return True
        if time.monotonic() > job.deadline:
            self._metrics.outcomes.labels("timeout").inc()
            job.deliver(Failure(504, "the request took longer than the server's --timeout; ask again later"))
            return True
        return False

    def _guarded(self, work: Callable[[], Any], jobs: list[Job | None]) -> Any:
        """The result of `work` for `jobs`; if it fails, they are told, none of them goes on, and it is None."""
        try:
            return work()
        except VtexportError as error:
            # Numbers that are none are no fault of whoever asked.
            self._failed(jobs, Failure(500 if isinstance(error, NumericError) else 400, str(error)))
        except Exception:
            # The engine's thread must outlive any request.
            logger.exception("a batch failed")
            self._failed(jobs, _BROKEN)
        return None

    def _failed(self, jobs: list[Job | None], failure: Failure) -> None:
        for number, job in enumerate(jobs):
            if job is not None:
                self._metrics.outcomes.labels("failed").inc()
                job.deliver(failure)
                jobs[number] = None
