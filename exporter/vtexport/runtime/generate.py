"""Greedy generation over any engine: a ragged batch, each row leaving it at its own end token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from vtexport.arrays import Array
from vtexport.pruning import PruningPlan
from vtexport.runtime.batch import Batch
from vtexport.runtime.inputs import admit, look
from vtexport.runtime.numeric import check_rows
from vtexport.runtime.request import Decoding, Request, Result, Timings
from vtexport.targets.engine import Engine, VisionOutput


class Generation:
    """The generation of one batch: creating it runs vision and prefill, each step of its iteration a decode step.

    Args:
        engine: an opened engine.
        plan: the plan compiled into it, or into its prefill graph number `bucket`.
        requests: at least one.
        decoding: how far to go.
        bucket: the number of the plan.
        vision: what the vision graph gave for these requests, if it has run already; `Timings.vision` is then zero.

    Raises:
        InputError: the batch exceeds what the engine was built for, prompt, visual and new tokens together exceed the
            model's positions, or the method refuses a prompt.
        NumericError: NaN or infinity came out of prefill, or in its iteration out of a decode step.
    """

    def __init__(
        self,
        engine: Engine,
        plan: PruningPlan,
        requests: Sequence[Request],
        decoding: Decoding,
        *,
        bucket: int = 0,
        vision: VisionOutput | None = None,
    ) -> None:
        admit(engine, requests, decoding)
        start = time.perf_counter()
        self._seen = look(engine, plan, requests) if vision is None else vision
        self._vision_ms = 1000 * (time.perf_counter() - start)
        self._decoding = decoding
        start = time.perf_counter()
        self._batch = Batch(engine, plan, requests, decoding, self._seen, bucket)
        self._prefill_ms = 1000 * (time.perf_counter() - start)
        self._step_ms: list[float] = []
        self.results = self._batch.results
        every = np.arange(len(requests))
        check_rows(self._batch.faults, every, every)

    def __iter__(self) -> Iterator[Mapping[int, int]]:
        """Yield, at every step, the next token of each request that still runs, by its number."""
        decoding, results = self._decoding, self.results
        history: list[list[Array]] = [[] for _ in results]
        running = np.ones(len(results), dtype=bool)
        batch, going = self._batch, np.arange(len(results))  # the number of each row's request
        for step in range(decoding.max_new_tokens):
            tokens = batch.logits.argmax(axis=1)
            rows = np.flatnonzero(running[going])
            check_rows(batch.faults, rows, going)
            given = {int(going[row]): int(tokens[row]) for row in rows}
            for row, (request, token) in zip(rows, given.items(), strict=True):
                results[request].token_ids.append(token)
                if decoding.keep_logits:
                    history[request].append(batch.logits[row].copy())
                running[request] = token not in decoding.eos_token_ids
            yield given
            if step + 1 == decoding.max_new_tokens or not running.any():
                break
            start = time.perf_counter()
            rows = self._going_on(running[going], decoding.max_new_tokens - step - 1)
            going = going[rows]
            batch.decode(tokens[rows])
            self._step_ms.append(1000 * (time.perf_counter() - start))
            if batch.cache.ranking is not None:
                for row in np.flatnonzero(running[going]):
                    results[going[row]].ranking = results[going[row]].ranking + batch.cache.ranking[row]
        for result, logits in zip(results, history, strict=True):
            result.logits = np.stack(logits) if logits else None

    def _going_on(self, running: Array, left: int) -> Array:
        """The rows of the batch, [B] to [B'], with which the next of at most `left` steps is made; others leave."""
        staying = np.flatnonzero(running)
        leaving = len(running) - len(staying)
        # To leave, the rows that stay are read and written once; every step then reads less by those that have left.
        # Until that pays, rows that have ended go on, and their tokens are ignored.
        if leaving and left * leaving >= 2 * len(staying) and self._batch.retain(staying):
            return staying
        return np.arange(len(running))

    @property
    def timings(self) -> Timings:
        """The timings of the batch so far."""
        return Timings(self._vision_ms, self._prefill_ms, tuple(self._step_ms), self._batch.largest)


def generate(
    engine: Engine,
    plan: PruningPlan,
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    on_token: Callable[[int, int], None] | None = None,
    bucket: int = 0,
    vision: VisionOutput | None = None,
) -> tuple[list[Result], Timings]:
    """Answer `requests` as one batch.

    Args:
        engine: see `Generation`.
        plan: see `Generation`.
        requests: see `Generation`.
        decoding: see `Generation`.
        on_token: called with (row, token) as tokens come.
        bucket: see `Generation`.
        vision: see `Generation`.

    Raises:
        InputError: see `Generation`.
        NumericError: see `Generation`.
    """
    generation = Generation(engine, plan, requests, decoding, bucket=bucket, vision=vision)
    for tokens in generation:
        if on_token is not None:
            for row, token in tokens.items():
                on_token(row, token)
    return generation.results, generation.timings
