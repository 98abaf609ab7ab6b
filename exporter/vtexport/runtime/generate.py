"""Greedy generation over any engine: a ragged batch, each row stopping at its own end token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import InputError
from vtexport.models.prompt import Prompt
from vtexport.models.views import Views
from vtexport.pruning.plan import VISION, PruningPlan
from vtexport.targets.base import Engine, PrefillInput, PrefillOutput, VisionInput, VisionOutput


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        prompt: its prompt.
        views: its images.
        ranking: scores [V] fp32 from another model, for method sgl.
        question_ids: the question [L] int64 in tokens of CLIP's text tower, for method cdpruner.
    """

    prompt: Prompt
    views: Views
    ranking: Array | None = None
    question_ids: Array | None = None


@dataclass
class Result:
    """One answer.

    Attributes:
        token_ids: the generated tokens, the end token included if it came.
        kept: by stage (`Stage.where`), the tokens that stay as they were, indices [K'] int32 into its input.
        debug: what else a debug build gives out: by stage `score` and `cluster`, and `raters` over the text.
        logits: [len(token_ids), vocabulary] fp32 if asked for.
        ranking: [V] attention to each visual token over prompt and answer, of a build that gives it.
        bucket: the number of the plan that this row got.
        spread: by what it was chosen, of a build with several plans.
    """

    token_ids: list[int] = field(default_factory=list)
    kept: dict[str, Array] = field(default_factory=dict)
    debug: dict[str, Array] = field(default_factory=dict)
    logits: Array | None = None
    ranking: Array | None = None
    bucket: int = 0
    spread: float | None = None


@dataclass(frozen=True)
class Timings:
    """Milliseconds of a batch, and the bytes of its KV cache."""

    vision: float
    prefill: float
    decode: tuple[float, ...]
    cache_bytes: int

    @property
    def per_token(self) -> float | None:
        """Median time of a decode step; None if there was none."""
        return float(np.median(self.decode)) if self.decode else None


def look(engine: Engine, plan: PruningPlan, requests: Sequence[Request]) -> VisionOutput:
    """The vision graph of `plan` on the images of `requests`, and on their questions if they carry them for it."""
    questions = [request.question_ids for request in requests if request.question_ids is not None]
    pixels = np.stack([request.views.pixels for request in requests])
    rows = [request.views.rows for request in requests if request.views.rows is not None]
    pruned = rows and plan.vision_stage is not None
    return engine.vision(
        VisionInput(
            pixels[:, 0] if plan.views == 1 else pixels,
            np.stack(questions) if questions else None,
            np.stack([row.sequence for row in rows]) if rows else None,
            np.stack([row.row_start for row in rows]) if pruned else None,
        )
    )


def visual_lengths(plan: PruningPlan, vision: VisionOutput, requests: Sequence[Request]) -> Array:
    """How many visual tokens of each image reach the decoder, [B, n] int64."""
    if vision.visual_length is not None:
        return vision.visual_length
    rows = [request.views.rows for request in requests if request.views.rows is not None]
    if rows:
        return np.stack([row.length for row in rows])
    images = len(requests[0].prompt.image_positions)
    return np.full((len(requests), images), plan.vision_tokens // images, dtype=np.int64)


def generate(
    engine: Engine,
    plan: PruningPlan,
    requests: Sequence[Request],
    max_new_tokens: int,
    *,
    eos_token_ids: Sequence[int],
    max_positions: int,
    on_token: Callable[[int, int], None] | None = None,
    keep_logits: bool = False,
    bucket: int = 0,
    vision: VisionOutput | None = None,
) -> tuple[list[Result], Timings]:
    """Answer `requests` greedily, as one batch.

    Args:
        engine: an opened engine.
        plan: the plan compiled into it, or into its prefill graph number `bucket`.
        requests: at least one.
        max_new_tokens: at least 1.
        eos_token_ids: tokens that end a row.
        max_positions: the model's longest sequence.
        on_token: called with (row, token) as tokens come.
        keep_logits: whether results carry logits.
        bucket: the number of the plan.
        vision: what the vision graph gave for these requests, if it has run already; `Timings.vision` is then zero.

    Raises:
        InputError: prompt, visual and new tokens together exceed `max_positions`.
    """
    lengths = np.array([len(request.prompt.token_ids) for request in requests], dtype=np.int64)
    start = time.perf_counter()
    if vision is None:
        vision = look(engine, plan, requests)
    looked = time.perf_counter()
    own = visual_lengths(plan, vision, requests)
    filled = own.sum(axis=1)
    longest = int((lengths + filled).max())
    if longest + max_new_tokens > max_positions:
        raise InputError(
            f"{longest} prompt tokens and {max_new_tokens} new ones exceed the model's {max_positions} positions; "
            "shorten the prompt or give a smaller --max-new-tokens"
        )
    _check_reach(plan, requests)
    input_ids = np.zeros((len(requests), int(lengths.max())), dtype=np.int64)
    for row, request in enumerate(requests):
        input_ids[row, : lengths[row]] = request.prompt.token_ids
    at = np.array([request.prompt.image_positions for request in requests], dtype=np.int64)

    given = [request.ranking for request in requests if request.ranking is not None]
    ranking = np.stack(given) if given else None

    prompts = PrefillInput(
        input_ids,
        at if at.shape[1] > 1 else at[:, 0],
        lengths,
        vision.seen(bucket).visual,
        ranking,
        own if at.shape[1] > 1 or plan.newlines else None,
    )
    filling = time.perf_counter()
    prefilled = engine.prefill(prompts, max_new_tokens, bucket)
    logits, cache = prefilled.logits, prefilled.cache
    filled_at = time.perf_counter()

    results = [_result(row, vision, prefilled, bucket) for row in range(len(requests))]
    history: list[list[Array]] = [[] for _ in requests]
    running = np.ones(len(requests), dtype=bool)
    # Every layer's cache holds all text and the visual tokens that entered it.
    visual = np.array(plan.entering(filled.tolist()), dtype=np.int64)
    cached = lengths[None] + visual
    ahead = 0 if plan.positions == "compact" else filled - visual
    steps: list[float] = []
    for step in range(max_new_tokens):
        tokens = logits.argmax(axis=1)
        for row in map(int, np.flatnonzero(running)):
            token = int(tokens[row])
            results[row].token_ids.append(token)
            if keep_logits:
                history[row].append(logits[row].copy())
            if on_token is not None:
                on_token(row, token)
            running[row] = token not in eos_token_ids
        if step + 1 == max_new_tokens or not running.any():
            break
        began = time.perf_counter()
        # Rows that have ended go on with the batch; what they yield is not read.
        logits = engine.decode(cache, tokens, cached, cached + ahead)
        steps.append(1000 * (time.perf_counter() - began))
        if cache.ranking is not None:
            for row in map(int, np.flatnonzero(running)):
                results[row].ranking = results[row].ranking + cache.ranking[row]
        cached = cached + 1
    if keep_logits:
        for result, rows in zip(results, history, strict=True):
            result.logits = np.stack(rows)
    timings = Timings(1000 * (looked - start), 1000 * (filled_at - filling), tuple(steps), cache.nbytes)
    return results, timings


def _check_reach(plan: PruningPlan, requests: Sequence[Request]) -> None:
    """Refuse prompts whose text lies farther from the image than the plan's method can weigh."""
    reach = int(plan.options.get("reach", 0))
    behind = max(len(request.prompt.token_ids) - request.prompt.image_positions[0] for request in requests)
    farthest = behind + plan.vision_tokens
    if reach and farthest >= reach:
        raise InputError(
            f"the prompt's end lies {farthest} positions behind the image's first token, and method {plan.method} "
            f"weighs distances below {reach} only; shorten the prompt"
        )


def _result(row: int, vision: VisionOutput, prefill: PrefillOutput, bucket: int) -> Result:
    """What the graphs gave out for one row, by stage."""
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
