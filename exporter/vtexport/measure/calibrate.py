"""calibrate: measures what the dense model's decoder attends to, layer by layer, over images and prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vtexport.builder.options import BuildOptions
from vtexport.errors import InputError
from vtexport.models.prompt import Prompt, Prompter
from vtexport.models.spec import ViewChoice
from vtexport.models.views import Views
from vtexport.options import option_fields
from vtexport.pruning import METHODS, Geometry, PruningPlan, make_plan, parts_of
from vtexport.pruning.adaptive import AdaptiveTable, check_buckets
from vtexport.pruning.calibration import RANK_TOLERANCE, Calibration
from vtexport.pruning.schedule import default_layers

if TYPE_CHECKING:
    from vtexport.check.reference import ReferenceModel

#: keep ratios for which pruning layers are tried
KEEPS = (0.5, 0.33, 0.25, 0.17, 0.11)
#: keep ratios at which methods are tried for `--keep auto`
BUCKETS = (0.5, 0.33, 0.25, 0.17, 0.125)
_BINS = 8
# Tokens of the dense model's greedy answer that must come out the same.
_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Trials:
    """What to measure beyond ranks and layers.

    Attributes:
        methods: methods to try for `--keep auto`, their options at their defaults.
        buckets: keep ratios to try them at, descending.
        exit_tolerance: share of the pairs whose next token may change when visual tokens leave early.
    """

    methods: tuple[str, ...] = ()
    buckets: tuple[float, ...] = BUCKETS
    exit_tolerance: float = 0.0

    @classmethod
    def parse(cls, methods: Sequence[str], buckets: str | None, exit_tolerance: float) -> Trials:
        """The trials that the flags of `vtexport calibrate` ask for.

        Raises:
            InputError: an invalid keep ratio, tolerance or method.
        """
        if buckets is None:
            return cls(tuple(methods), BUCKETS, exit_tolerance)
        tried = option_fields(BuildOptions)["buckets"].parse(buckets, "vtexport calibrate")
        check_buckets(tried)
        return cls(tuple(methods), tuple(sorted(tried, reverse=True)), exit_tolerance)

    def __post_init__(self) -> None:
        if not 0 <= self.exit_tolerance < 1:
            raise InputError(
                f"--exit-tolerance {self.exit_tolerance:g} is out of range; give a share from 0 to below 1"
            )
        for method in self.methods:
            parts_of(method)
            if not all(METHODS[part].adaptive for part in method.split("+")):
                raise InputError(f"--method {method} has nothing to calibrate for --keep auto; leave it out")


@dataclass(frozen=True)
class Pair:
    """The image files of one prompt, and its text."""

    images: tuple[Path, ...]
    prompt: str


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSON-lines file: objects with `image` (one path or several, relative to the file) and `prompt`.

    Raises:
        InputError: the file is missing, a line is not such an object, or there is no pair.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give JSON lines of image and prompt as --data")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image, prompt = entry["image"], entry["prompt"]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f'{path}, line {number}: not a pair; write {{"image": "photo.png", "prompt": "what is it?"}}'
            ) from error
        listed = image if isinstance(image, list) else [image]
        pairs.append(Pair(tuple(path.parent / str(file) for file in listed), str(prompt)))
    if not pairs:
        raise InputError(f"{path} holds no usable pair; give JSON lines of image and prompt")
    return pairs


def calibrate_model(
    name: str,
    pairs: Sequence[Pair],
    trials: Trials | None = None,
    advance: Callable[[], None] = lambda: None,
    views: ViewChoice | None = None,
) -> Calibration:
    """Measure the model `name` (see `vtexport.models.resolve_model`) on `pairs`; see `calibrate`."""
    from vtexport.check.reference import ReferenceModel
    from vtexport.models import Checkpoint, read_spec, resolve_model
    from vtexport.models.names import fingerprint

    folder = resolve_model(name)
    spec = read_spec(folder, views)
    if trials is not None and trials.methods and (spec.views.total > 1 or not spec.vision.class_token):
        raise InputError("--method is for --keep auto, which goes by the CLS attention of a single view; leave it out")
    mark = fingerprint(Checkpoint.open(folder))
    prompter = Prompter(folder, spec)
    return calibrate(ReferenceModel(folder, spec), prompter, pairs, mark, trials or Trials(), advance)


def calibrate(
    model: ReferenceModel,
    prompter: Prompter,
    pairs: Sequence[Pair],
    fingerprint: str,
    trials: Trials,
    advance: Callable[[], None] = lambda: None,
) -> Calibration:
    """Measure `model` on `pairs`; `Calibration` lists the measurements.

    Args:
        model: the dense model.
        prompter: its processor.
        pairs: images and prompts, at least one.
        fingerprint: of the checkpoint.
        trials: what else to measure.
        advance: called `steps(pairs, trials)` times.

    Raises:
        InputError: a method cannot keep as few tokens as `trials` ask for.
    """
    plan = partial(make_plan, geometry=Geometry.of(model.spec))
    subjects = [
        _Subject(model, plan, prompter.prompt(p.prompt), prompter.views(prompter.open_pictures(p.images)))
        for p in pairs
    ]
    measured = []
    for subject in subjects:
        measured.append(_measure(subject))
        advance()
    ranks = np.array([values.ranks for values in measured])
    calibration = Calibration(
        model=fingerprint,
        num_visual_tokens=model.spec.num_visual_tokens,
        pairs=len(measured),
        ranks=_rounded(ranks.mean(axis=0)),
        rank_spread=_rounded(ranks.std(axis=0)),
        mass=_rounded(np.mean([values.mass for values in measured], axis=0)),
        keeps=KEEPS,
        layers=(default_layers(model.spec.decoder.num_layers),) * len(KEEPS),
        agreement=(0.0,) * len(KEEPS),
        # Nothing is left to drop after the last layer, so the last layer always qualifies.
        exit_layer=int(
            np.flatnonzero(np.mean([values.changed for values in measured], axis=0) <= trials.exit_tolerance)[0]
        ),
        exit_tolerance=trials.exit_tolerance,
    )
    choices = []
    for keep in KEEPS:
        choices.append(_best_layers(subjects, calibration, keep))
        advance()
    calibration = replace(
        calibration,
        layers=tuple(layers for layers, _ in choices),
        agreement=_rounded([agreement for _, agreement in choices]),
    )
    tables = [_adaptive_table(subjects, calibration, method, trials.buckets, advance) for method in trials.methods]
    return replace(calibration, adaptive=tuple(tables))


def steps(pairs: Sequence[Pair], trials: Trials) -> int:
    """How often `calibrate` calls `advance`."""
    return len(pairs) + len(KEEPS) + len(trials.methods) * len(trials.buckets)


def _adaptive_table(
    subjects: Sequence[_Subject],
    calibration: Calibration,
    method: str,
    buckets: Sequence[float],
    advance: Callable[[], None],
) -> AdaptiveTable:
    """How often `method` leaves the dense answer unchanged, by keep ratio and spread of CLS's attention."""
    spreads = np.array([subject.spread for subject in subjects])
    # Bins of equally many pairs; a stable order, so that equal spreads fall into the same bins every time.
    bins = np.array_split(np.argsort(spreads, kind="stable"), min(_BINS, len(subjects)))
    rows = []
    for keep in buckets:
        plan = subjects[0].plan(method, keep=keep, calibration=calibration)
        same = np.array([subject.same_answer(plan) for subject in subjects])
        rows.append(_rounded([same[members].mean() for members in bins]))
        advance()
    return AdaptiveTable(method, tuple(buckets), _rounded([spreads[members].max() for members in bins]), tuple(rows))


def _candidates(num_layers: int) -> list[tuple[int, ...]]:
    """The layer sets to try: SparseVLM's three, scaled; three spaced alike from each early layer; each alone."""
    last, candidates = num_layers - 2, [default_layers(num_layers)]
    for first in range(min(num_layers // 2, last) + 1):
        depth = max(first, 1)
        candidates.append(tuple(sorted({min(layer, last) for layer in (first, 3 * depth, 15 * depth // 2)})))
        candidates.append((first,))
    return list(dict.fromkeys(candidates))


def _best_layers(subjects: Sequence[_Subject], calibration: Calibration, keep: float) -> tuple[tuple[int, ...], float]:
    """The layers that keep the dense model's next token likeliest at `keep`, and how often it stays the next token."""
    best: tuple[float, tuple[int, ...], float] = (-np.inf, calibration.layers[0], 0.0)
    for layers in _candidates(len(calibration.ranks)):
        options = {"layers": ",".join(map(str, layers))}
        try:
            plan = subjects[0].plan("sparsevlm", keep=keep, options=options, calibration=calibration)
        except InputError:  # out of reach with these layers
            continue
        chances = np.array([subject.chance(plan) for subject in subjects])
        # With equal likelihoods the first candidate wins, so that the choice is reproducible.
        likelihood = float(np.log(chances[:, 0] + 1e-9).mean())
        if likelihood > best[0]:
            best = likelihood, layers, float(chances[:, 1].mean())
    return best[1], best[2]


def _rounded(values: Any) -> tuple[float, ...]:
    return tuple(float(f"{value:.4g}") for value in values)


class _Subject:
    """One pair on the model: its visual tokens, and the dense model's greedy next token."""

    def __init__(self, model: ReferenceModel, plan: Callable[..., PruningPlan], prompt: Prompt, views: Views) -> None:
        self.model, self.plan, self.prompt, self.views = model, plan, prompt, views
        self.dense = self.plan("dense", keep=1.0)
        seen = model.vision(views, self.dense)
        self.visual, self.length, self.spread = seen.visual, seen.length, seen.spread
        self.token = int(self.answer((), self.dense)[0].argmax())

    def answer(self, new_tokens: Sequence[int], plan: PruningPlan) -> Any:
        """The logits of `plan` after the prompt and each of `new_tokens`."""
        seen = self if plan.vision_stage is None else self.model.vision(self.views, plan)
        return self.model.answer(self.prompt, seen.visual, new_tokens, plan, length=seen.length).logits

    def chance(self, plan: PruningPlan) -> tuple[float, bool]:
        """The probability of the dense model's token under `plan`, and whether it is the greedy one."""
        logits = self.answer((), plan)[0].astype(np.float64)
        weights = np.exp(logits - logits.max())
        return float(weights[self.token] / weights.sum()), int(logits.argmax()) == self.token

    @cached_property
    def dense_answer(self) -> list[int]:
        """The dense model's greedy answer, up to its end token or `_ANSWER_TOKENS` tokens."""
        tokens = [self.token]
        while len(tokens) < _ANSWER_TOKENS and tokens[-1] not in self.model.spec.eos_token_ids:
            tokens.append(int(self.answer(tokens, self.dense)[-1].argmax()))
        return tokens

    def same_answer(self, plan: PruningPlan) -> bool:
        """Whether `plan` leaves the dense answer unchanged, checked for all its tokens in one pass."""
        logits = self.answer(self.dense_answer[:-1], plan)
        return bool(np.array_equal(logits.argmax(axis=1), self.dense_answer))


@dataclass(frozen=True)
class _Measured:
    """One pair, a value per layer; `changed`: whether dropping the image after that layer changes the next token."""

    ranks: list[int]
    mass: list[float]
    changed: list[bool]


def _measure(subject: _Subject) -> _Measured:
    import torch

    ranks, masses = [], []
    for attention in subject.model.rater_attention(subject.prompt, subject.visual, subject.length):
        values = torch.linalg.svdvals(attention)
        ranks.append(int((values >= RANK_TOLERANCE * values[0]).sum()))
        masses.append(float(attention.sum(dim=1).mean()))
    changed = [
        not subject.chance(subject.plan("exit", keep=None, options={"layers": str(layer)}))[1]
        for layer in range(len(ranks) - 1)
    ]
    return _Measured(ranks, masses, [*changed, False])
