"""Greedy generation over any engine: a ragged batch, each row leaving it at its own end token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import InputError
from vtexport.pruning.plan import VISION, PruningPlan
from vtexport.runtime.request import Decoding, Request, Result, Timings
from vtexport.targets.engine import Engine, PrefillInput, PrefillOutput, VisionInput, VisionOutput


def look(engine: Engine, plan: PruningPlan, requests: Sequence[Request]) -> VisionOutput:
    """The vision graph of `plan` on the images of `requests`."""
    pixels = np.stack([request.views.pixels for request in requests])
    rows = [request.views.rows for request in requests if request.views.rows is not None]
    pruned = rows and plan.vision_stage is not None
    return engine.vision(
        VisionInput(
            pixels[:, 0] if plan.views == 1 else pixels,
            np.stack([row.sequence for row in rows]) if rows else None,
            np.stack([row.row_start for row in rows]) if pruned else None,
            extras=_extras(plan, "vision", requests),
        )
    )


def vision_extras(plan: PruningPlan) -> list[str]:
    """The names of the inputs that the methods of `plan` need in the vision graph besides images."""
    return _extra_names(plan, "vision")


def _extra_names(plan: PruningPlan, graph: str) -> list[str]:
    return [extra.name for part in plan.methods.parts for extra in part.extras if extra.graph == graph]


def _extras(plan: PruningPlan, graph: str, requests: Sequence[Request]) -> dict[str, Array]:
    """The inputs of `graph` that the methods of `plan` need besides images and prompts, stacked over the batch."""
    names = _extra_names(plan, graph)
    return {name: np.stack([request.extras[name] for request in requests]) for name in names}


def admit(engine: Engine, requests: Sequence[Request], decoding: Decoding) -> None:
    """Refuse requests that together exceed what `engine` was built for; see `Engine.admit`."""
    longest = max(len(request.prompt.token_ids) for request in requests)
    engine.admit(len(requests), longest, decoding.max_new_tokens)


def visual_lengths(plan: PruningPlan, vision: VisionOutput, requests: Sequence[Request]) -> Array:
    """How many visual tokens of each image reach the decoder, [B, n] int64."""
    if vision.visual_length is not None:
        return vision.visual_length
    rows = [request.views.rows for request in requests if request.views.rows is not None]
    if rows:
        return np.stack([row.length for row in rows])
    images = len(requests[0].prompt.image_positions)
    lengths: Array = np.full((len(requests), images), plan.vision_tokens // images, dtype=np.int64)
    return lengths


def prefill_input(
    plan: PruningPlan, requests: Sequence[Request], vision: VisionOutput, bucket: int = 0
) -> PrefillInput:
    """The prompts of `requests` with their visual tokens, for the graph of `plan`, number `bucket`."""
    lengths = np.array([len(request.prompt.token_ids) for request in requests], dtype=np.int64)
    input_ids = np.zeros((len(requests), int(lengths.max())), dtype=np.int64)
    for row, request in enumerate(requests):
        input_ids[row, : lengths[row]] = request.prompt.token_ids
    at = np.array([request.prompt.image_positions for request in requests], dtype=np.int64)
    several = at.shape[1] > 1
    return PrefillInput(
        input_ids,
        at if several else at[:, 0],
        lengths,
        vision.seen(bucket).visual,
        visual_lengths(plan, vision, requests) if several or plan.newlines else None,
        extras=_extras(plan, "prefill", requests),
    )


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
        self._lengths = np.array([len(request.prompt.token_ids) for request in requests], dtype=np.int64)
        admit(engine, requests, decoding)
        start = time.perf_counter()
        self._seen = look(engine, plan, requests) if vision is None else vision
        self._vision_ms = 1000 * (time.perf_counter() - start)
        self._engine, self._plan, self._decoding = engine, plan, decoding
        self._filled = visual_lengths(plan, self._seen, requests)
        _check_positions(self._lengths + self._filled.sum(axis=1), decoding)
        _check_prompts(plan, requests)
        inputs = prefill_input(plan, requests, self._seen, bucket)
        start = time.perf_counter()
        prefilled = engine.prefill(inputs, decoding.max_new_tokens, bucket)
        self._prefill_ms = 1000 * (time.perf_counter() - start)
        self._logits, self._cache = prefilled.logits, prefilled.cache
        self._step_ms: list[float] = []
        self._cache_bytes = 0
        self.results = [_result(row, self._seen, prefilled, bucket) for row in range(len(requests))]

    def __iter__(self) -> Iterator[Mapping[int, int]]:
        """Yield, at every step, the next token of each request that still runs, by its number."""
        decoding, results = self._decoding, self.results
        history: list[list[Array]] = [[] for _ in results]
        running = np.ones(len(results), dtype=bool)
        batch: Array = np.arange(len(results))  # the number of each row's request
        # Every layer's cache holds all text and the visual tokens that entered it.
        filled = self._filled.sum(axis=1)
        visual = np.array(self._plan.entering(filled.tolist()), dtype=np.int64)
        cached = self._lengths[None] + visual
        ahead = np.zeros_like(visual) if self._plan.positions == "compact" else filled - visual
        for step in range(decoding.max_new_tokens):
            tokens = self._logits.argmax(axis=1)
            rows = np.flatnonzero(running[batch])
            given = {int(batch[row]): int(tokens[row]) for row in rows}
            for row, (request, token) in zip(rows, given.items(), strict=True):
                results[request].token_ids.append(token)
                if decoding.keep_logits:
                    history[request].append(self._logits[row].copy())
                running[request] = token not in decoding.eos_token_ids
            yield given
            if step + 1 == decoding.max_new_tokens or not running.any():
                break
            start = time.perf_counter()
            rows = self._going_on(running[batch], decoding.max_new_tokens - step - 1)
            batch, tokens = batch[rows], tokens[rows]
            length = cached[:, batch] + step
            self._logits = self._engine.decode(self._cache, tokens, length, length + ahead[:, batch])
            self._step_ms.append(1000 * (time.perf_counter() - start))
            if self._cache.ranking is not None:
                for row in np.flatnonzero(running[batch]):
                    results[batch[row]].ranking = results[batch[row]].ranking + self._cache.ranking[row]
        for result, logits in zip(results, history, strict=True):
            result.logits = np.stack(logits) if logits else None

    def _going_on(self, running: Array, left: int) -> Array:
        """The rows of the batch, [B] to [B'], with which the next of at most `left` steps is made; others leave."""
        staying = np.flatnonzero(running)
        leaving = len(running) - len(staying)
        # To leave, the rows that stay are read and written once; every step then reads less by those that have left.
        # Until that pays, rows that have ended go on, and their tokens are ignored.
        if leaving and left * leaving >= 2 * len(staying):
            self._cache_bytes = max(self._cache_bytes, self._cache.nbytes)
            if self._engine.retain(self._cache, staying):
                return staying
        return np.arange(len(running))

    @property
    def timings(self) -> Timings:
        """The timings of the batch so far."""
        largest = max(self._cache_bytes, self._cache.nbytes)
        return Timings(self._vision_ms, self._prefill_ms, tuple(self._step_ms), largest)


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
    """
    generation = Generation(engine, plan, requests, decoding, bucket=bucket, vision=vision)
    for tokens in generation:
        if on_token is not None:
            for row, token in tokens.items():
                on_token(row, token)
    return generation.results, generation.timings


def _check_positions(lengths: Array, decoding: Decoding) -> None:
    """Refuse rows of `lengths` prompt tokens that leave no room for the new ones."""
    longest = int(lengths.max())
    if longest + decoding.max_new_tokens > decoding.max_positions:
        raise InputError(
            f"{longest} prompt tokens and {decoding.max_new_tokens} new ones exceed the model's {decoding.max_positions} "
            "positions; shorten the prompt or give a smaller --max-new-tokens"
        )


def _check_prompts(plan: PruningPlan, requests: Sequence[Request]) -> None:
    """Refuse prompts that the plan's method cannot rate."""
    if plan.methods.decoder is not None:
        behind = max(len(request.prompt.token_ids) - request.prompt.image_positions[0] for request in requests)
        plan.methods.decoder.check_prompt(behind + plan.vision_tokens)


def _result(row: int, vision: VisionOutput, prefill: PrefillOutput, bucket: int) -> Result:
    """The outputs of the graphs for one row, by stage."""
    result = Result(bucket=bucket)
    kept = vision.seen(bucket).kept
    if kept is not None:
        result.kept[VISION] = kept[row][kept[row] >= 0]
    if vision.score is not None:
        result.debug[f"score.{VISION}"] = vision.score[row]
    for name, array in prefill.stages.items():
        kind, _, layer = name.partition(".")
        if name == "ranking":
            result.ranking = array[row]
        elif kind == "kept":
            result.kept[f"decoder.{layer}"] = array[row][array[row] >= 0]
        else:
            result.debug[f"{kind}.decoder.{layer}" if layer else kind] = array[row]
    return result
