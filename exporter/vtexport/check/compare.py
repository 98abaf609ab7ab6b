"""Compares an engine with the reference model, on sample images and prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from vtexport.arrays import Array
from vtexport.bundle.manifest import VerificationEntry
from vtexport.check.reference import ReferenceModel, ReferenceVision
from vtexport.check.tolerance import ROUNDED, SCORE_SLACK, SPREAD_SLACK, TOLERANCE, advice
from vtexport.errors import VerificationError
from vtexport.models import ModelSpec, Prompter
from vtexport.models.views import Views
from vtexport.pruning import PruningPlan
from vtexport.pruning.plan import VISION
from vtexport.pruning.selection import selecting_stage
from vtexport.runtime.generate import generate
from vtexport.runtime.inputs import look, prefill_input, visual_lengths
from vtexport.runtime.request import Decoding, Request
from vtexport.targets.engine import Engine, Selector, VisionOutput
from vtexport.targets.quantize import Scheme

SAMPLES = 4
NEW_TOKENS = 16
_PROMPTS = (
    "What is shown in this image?",
    "How many things are there, and what colour has the largest one?",
    "Where is it?",
    "Describe the image in one sentence.",
)


def sample_image(height: int, width: int, seed: int) -> Array:
    """An image uint8 [height, width, 3] of discs on gradients under noise; equal seeds give equal images."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[0:height, 0:width]
    y, x, size = row / height, column / width, min(height, width)
    plane = rng.uniform(0, 255, 3) * x[..., None] + rng.uniform(0, 255, 3) * y[..., None]
    for _ in range(4):
        cy, cx = rng.integers(0, height), rng.integers(0, width)
        radius = rng.integers(max(2, size // 12), max(3, size // 5))
        plane[(row - cy) ** 2 + (column - cx) ** 2 < radius**2] = rng.uniform(0, 255, 3)
    image: Array = np.clip(plane / 2 + rng.uniform(0, 64, plane.shape), 0, 255).astype(np.uint8)
    return image


def sample_views(prompter: Prompter, spec: ModelSpec) -> list[Views]:
    """Sample images as the model takes them; each has another shape if the model unpads."""
    from PIL import Image

    v, size = spec.views, spec.vision.image_size
    views = []
    for sample in range(SAMPLES):
        height, width = size, size
        if v.tiles is not None:
            # Nearly the grid's own shape, so that it fits better than any other grid.
            height, width = v.tiles[0] * size, v.tiles[1] * size
            height, width = (height - sample, width) if sample % 2 else (height, width - sample)
        images = [Image.fromarray(sample_image(height, width, sample + SAMPLES * i)) for i in range(v.pictures)]
        views.append(prompter.views(prompter.grouped(images)))
    return views


@dataclass(frozen=True)
class Checked:
    """The checkpoint that an engine is compared with: its folder, a bundle's processor, its geometry, a CLIP's folder.

    `scheme` is the quantisation of the engine's weights, in its dtype; the reference's weights are rounded alike.
    """

    folder: Path
    processor: Path
    spec: ModelSpec
    clip: Path | None = None
    scheme: Scheme | None = None


def sample_requests(model: Checked, plan: PruningPlan) -> list[Request]:
    """The samples as requests to the graphs of `plan`; inputs that another bundle would give are random."""
    prompter, rng = Prompter(model.processor, model.spec), np.random.default_rng(0)
    extras: list[dict[str, Array]] = [{} for _ in _PROMPTS]
    for extra in (extra for part in plan.methods.parts for extra in part.extras):
        make, shape = extra.of_questions(model.processor, model.spec), extra.shape(model.spec, plan)
        for sample, text in zip(extras, _PROMPTS, strict=True):
            sample[extra.name] = rng.random(shape, dtype=np.float32) if make is None else make(text)
    parts = zip(_PROMPTS, sample_views(prompter, model.spec), extras, strict=True)
    return [Request(prompter.prompt(text), views, given) for text, views, given in parts]


# How NumPy has weights of a dtype.
_HELD: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def _rounding(scheme: Scheme | None, dtype: str) -> Callable[[Array], Array] | None:
    """The function that rounds an fp32 weight as `scheme` does in an engine of `dtype`; None for no rounding."""
    if scheme is None:
        return None
    held = _HELD[dtype]
    return lambda weight: scheme.rounded(weight.astype(held)).astype(np.float32)


def compare_engine(
    engine: Engine,
    ran: str,
    model: Checked,
    plans: Sequence[PruningPlan],
    dtype: str,
    advance: Callable[[], None],
    *,
    vision_only: bool = False,
    selects: bool = False,
    rounded: bool = False,
    batch: int = SAMPLES,
) -> VerificationEntry:
    """Compare `engine`, on ragged batches of the samples, with the reference, row by row, under every plan.

    Kept indices must be equal, but lower precision may swap tokens of nearly equal score; the reference then goes on
    with the engine's kept tokens. Logits must agree within the tolerance. Every greedy token must be the reference's
    own choice, or one whose logit is within twice the tolerance of it.

    Args:
        engine: the opened engine.
        ran: what was opened, for the manifest: a target, or the ONNX files where a target cannot run here.
        model: the checkpoint.
        plans: the plans compiled into the engine.
        dtype: "fp32", "fp16" or "bf16".
        advance: called once per sample and plan.
        vision_only: there is only a vision graph; its visual tokens are then compared as logits are.
        selects: behind the vision graph, there is one that chooses visual tokens; its choice is compared.
        rounded: the engine rounds activations to 8 bits.
        batch: prompts per batch at most.

    Raises:
        VerificationError: the engine differs from the reference.
    """
    spec = model.spec
    requests = sample_requests(model, plans[0])
    precision = ROUNDED if rounded else dtype
    rounding = {
        "layers": _rounding(model.scheme, dtype),
        "head": _rounding(None if model.scheme is None else model.scheme.head, dtype),
    }
    reference = ReferenceModel(model.folder, spec, model.clip, rounding)
    check, results = _check_choice if selects else _check_vision if vision_only else _check_plan, []
    for first in range(0, len(requests), batch):
        together = requests[first : first + batch]
        seen = look(engine, plans[0], together)
        samples = _Samples(reference, together, seen, spec.decoder.max_positions, precision)
        results += [check(engine, bucket, plan, samples, advance) for bucket, plan in enumerate(plans)]
    return VerificationEntry(
        ran=ran,
        against="transformers, fp32, eager attention",
        samples=SAMPLES,
        tokens=0 if vision_only else NEW_TOKENS,
        same_kept=all(result.same_kept for result in results),
        same_tokens=all(result.same_tokens for result in results),
        max_logit_error=max(result.worst for result in results),
        tolerance=TOLERANCE[precision],
    )


@dataclass(frozen=True)
class _Samples:
    """What every plan is checked on: the reference, the requests, and the engine's vision output for them."""

    reference: ReferenceModel
    requests: list[Request]
    vision: VisionOutput
    max_positions: int
    precision: str


@dataclass
class _Found:
    """The result of checking one plan."""

    worst: float = 0.0
    same_kept: bool = True
    same_tokens: bool = True


def _check_vision(
    _engine: Engine, bucket: int, plan: PruningPlan, samples: _Samples, advance: Callable[[], None]
) -> _Found:
    """Compare the vision stage of plan number `bucket` with the reference; see `compare_engine`."""
    result, engine_vision = _Found(), samples.vision.seen(bucket)
    lengths = visual_lengths(plan, samples.vision, samples.requests)
    for row, request in enumerate(samples.requests):
        seen = samples.reference.vision(request.views, plan, request.extras)
        kept = None if engine_vision.kept is None else engine_vision.kept[row][engine_vision.kept[row] >= 0]
        swapped = _swapped(kept, seen, plan, samples.precision, result)
        # If lower precision swapped tokens, the rows hold different tokens and cannot be compared.
        if not swapped:
            wanted, number = np.asarray(seen.visual[0]), int(lengths[row].sum())
            _check_error(
                np.asarray(engine_vision.visual[row, :number]),
                wanted[:number],
                samples.precision,
                "visual tokens",
                result,
            )
        advance()
    return result


def _check_choice(
    engine: Engine, bucket: int, plan: PruningPlan, samples: _Samples, advance: Callable[[], None]
) -> _Found:
    """Compare the vision stage, and the tokens that the decoder's first layers choose, with the reference."""
    result, chooser = _check_vision(engine, bucket, plan, samples, advance), cast(Selector, engine)
    requests, where = samples.requests, selecting_stage(plan).where
    chosen = chooser.select(prefill_input(plan, requests, samples.vision, bucket))
    lengths = visual_lengths(plan, samples.vision, requests)
    for row, request in enumerate(requests):
        visual = np.asarray(samples.vision.seen(bucket).visual[row : row + 1], dtype=np.float32)
        length = tuple(map(int, lengths[row]))
        expected = samples.reference.answer(request.prompt, visual, (), plan, extras=request.extras, length=length)
        kept = chosen.kept[row][chosen.kept[row] >= 0]
        if not np.array_equal(kept, expected.kept[where]):
            result.same_kept = False
            _check_swaps(kept, expected.kept[where], expected.score[where], samples.precision)
    return result


def _check_error(got: Array, wanted: Array, precision: str, what: str, result: _Found) -> None:
    """Record the largest difference as a share of the largest value; refuse one beyond the tolerance."""
    error = float(np.abs(wanted - got).max() / max(1.0, np.abs(wanted).max()))
    result.worst = max(result.worst, error)
    if not error <= TOLERANCE[precision]:
        raise VerificationError(
            f"the engine's {what} differ from the reference's by {error:.2g} of their range "
            f"(allowed {TOLERANCE[precision]:g}); {advice(precision)}"
        )


def _swapped(mine: Array | None, seen: ReferenceVision, plan: PruningPlan, precision: str, result: _Found) -> bool:
    """Whether the vision stage kept other tokens than the reference, as only lower precision may; see `result`."""
    if mine is None:
        return False
    assert seen.kept is not None
    theirs, method = seen.kept[0], plan.methods.vision
    if np.array_equal(mine, theirs):
        return False
    result.same_kept = False
    # With several views, scores are numbered by patch, which is not how tokens are numbered.
    plain = seen.score is not None and method.ranked and plan.views == 1 and not plan.newlines
    score = seen.score[0] if plain and seen.score is not None else None
    _check_swaps(mine - plan.leading, theirs - plan.leading, score, precision)
    return True


def _check_plan(
    engine: Engine, bucket: int, plan: PruningPlan, samples: _Samples, advance: Callable[[], None]
) -> _Found:
    """Compare plan number `bucket` of `engine` with the reference; see `compare_engine`."""
    reference, requests, precision = samples.reference, samples.requests, samples.precision
    # Without end tokens every row runs the full length.
    decoding = Decoding(NEW_TOKENS, samples.max_positions, keep_logits=True)
    answers, _ = generate(engine, plan, requests, decoding, bucket=bucket, vision=samples.vision)
    result, engine_vision = _Found(), samples.vision.seen(bucket)
    lengths = visual_lengths(plan, samples.vision, requests)
    for row, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        seen = reference.vision(request.views, plan, request.extras)
        visual, length = seen.visual, seen.length
        if _swapped(answer.kept.get(VISION), seen, plan, precision, result):
            length = tuple(map(int, lengths[row]))
            visual = np.asarray(engine_vision.visual[row : row + 1], dtype=np.float32)
        answered = partial(reference.answer, request.prompt, visual, answer.token_ids[:-1], plan)
        expected = answered(extras=request.extras, length=length)
        differ = [where for where, kept in expected.kept.items() if not np.array_equal(answer.kept[where], kept)]
        if differ:
            result.same_kept = False
            # Both see the same tokens up to the first stage that differs; after it, indices mean different tokens.
            first = differ[0]
            _check_swaps(answer.kept[first], expected.kept[first], expected.score[first], precision)
            expected = answered(forced=answer.kept, extras=request.extras, length=length)
        logits = expected.logits
        assert answer.logits is not None, "logits were asked for"
        _check_error(answer.logits, logits, precision, "logits", result)
        margin = logits.max(axis=1) - np.take_along_axis(logits, np.array(answer.token_ids)[:, None], 1)[:, 0]
        result.same_tokens &= bool((margin == 0).all())
        if (margin > 2 * TOLERANCE[precision] * max(1.0, np.abs(logits).max())).any():
            raise VerificationError(f"the engine's greedy tokens differ from the reference's; {advice(precision)}")
        spread = samples.vision.arrays.get("spread")
        if (
            spread is not None
            and seen.spread is not None
            and abs(spread[row] - seen.spread) > SPREAD_SLACK[precision] * seen.spread
        ):
            raise VerificationError(
                f"CLS's attention is spread over {spread[row]:.4g} patches in the engine, {seen.spread:.4g} in the "
                "reference; please report this model"
            )
        advance()
    return result


def _check_swaps(got: Array, expected: Array, score: Array | None, precision: str) -> None:
    """Refuse differing kept tokens if `precision` can tell their scores [V] apart.

    A tenth may differ without scores, and with rounded activations, after which scores are no longer comparable.
    """
    moved = np.setxor1d(got, expected)
    if score is None or precision == ROUNDED:
        fits = precision != "fp32" and len(moved) <= 2 * max(1, len(expected) // 10)
    else:
        line = score[expected].min()
        fits = bool((np.abs(score[moved] - line) <= SCORE_SLACK[precision] * abs(line)).all())
    if not fits:
        raise VerificationError(
            f"the engine keeps other visual tokens than the reference ({len(moved)} differ); {advice(precision)}"
        )
