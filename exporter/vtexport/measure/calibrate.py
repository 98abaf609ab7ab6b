"""calibrate: measures what the dense model's decoder attends to, layer by layer, over images and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from vtexport.builder.options import BuildOptions
from vtexport.errors import InputError
from vtexport.measure.calibration.batches import Measured
from vtexport.measure.calibration.partial import Partial
from vtexport.measure.calibration.passes import Passes, Subjects
from vtexport.measure.questions import json_lines
from vtexport.models.prompt import Prompter
from vtexport.models.spec import ViewChoice
from vtexport.options import option_fields
from vtexport.progress import Progress, Silent
from vtexport.pruning import METHODS, PruningPlan, parts_of
from vtexport.pruning.adaptive import AdaptiveTable, check_buckets
from vtexport.pruning.calibration import Calibration
from vtexport.pruning.schedule import default_layers
from vtexport.reading import Unreadable, parse_json

if TYPE_CHECKING:
    from vtexport.check.batched import BatchedModel

#: keep ratios for which pruning layers are tried
KEEPS = (0.5, 0.33, 0.25, 0.17, 0.11)
#: keep ratios at which methods are tried for `--keep auto`
BUCKETS = (0.5, 0.33, 0.25, 0.17, 0.125)
_BINS = 8


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


class _PairLine(msgspec.Struct):
    """A line of the file; other keys are not read."""

    image: str | list[str]
    prompt: str


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSON-lines file: objects with `image` (one path or several, relative to the file) and `prompt`.

    Raises:
        InputError: the file is missing, a line is not such an object, or there is no pair.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give JSON lines of image and prompt as --data")
    pairs = []
    for number, line in json_lines(path):
        try:
            entry = parse_json(line, _PairLine)
        except Unreadable as error:
            raise InputError(
                f'{path}, line {number}: not a pair ({error}); write {{"image": "photo.png", "prompt": "what is it?"}}'
            ) from error
        # The file is the user's own, so its paths may lead anywhere.
        listed = entry.image if isinstance(entry.image, list) else [entry.image]
        pairs.append(Pair(tuple(path.parent / file for file in listed), entry.prompt))
    if not pairs:
        raise InputError(f"{path} holds no usable pair; give JSON lines of image and prompt")
    return pairs


def calibrate_model(
    name: str,
    pairs: Sequence[Pair],
    trials: Trials | None = None,
    progress: Progress | None = None,
    views: ViewChoice | None = None,
    partial: Path | None = None,
) -> Calibration:
    """Measure the model `name` (see `vtexport.models.resolve_model`) on `pairs`; see `calibrate`."""
    from vtexport.check.batched import BatchedModel
    from vtexport.models import Checkpoint, read_spec, resolve_model
    from vtexport.models.names import fingerprint

    folder = resolve_model(name)
    spec = read_spec(folder, views)
    if trials is not None and trials.methods and (spec.views.total > 1 or not spec.vision.class_token):
        raise InputError("--method is for --keep auto, which goes by the CLS attention of a single view; leave it out")
    mark = fingerprint(Checkpoint.open(folder))
    subjects = Subjects.of(pairs, Prompter(folder, spec))
    model = BatchedModel(folder, spec)
    return calibrate(model, subjects, mark, trials or Trials(), progress or Silent(), partial)


def calibrate(
    model: BatchedModel,
    subjects: Subjects,
    fingerprint: str,
    trials: Trials,
    progress: Progress,
    partial: Path | None = None,
) -> Calibration:
    """Measure `model`; `Calibration` lists the measurements.

    Args:
        model: the dense model.
        subjects: images and prompts, at least one.
        fingerprint: of the checkpoint.
        trials: what else to measure.
        progress: told of every pair in each of the passes over them.
        partial: file that keeps the results so far; whoever saves the calibration removes it (`partial_file`).

    Raises:
        InputError: a method cannot keep as few tokens as `trials` ask for, or `partial` is no file.
        ModelError: a layer gives NaN or infinity.
        StorageError: `partial` cannot be written.
    """
    passes = Passes(model, subjects, fingerprint, Partial(partial, progress.warn), progress)
    measured = passes.measure(answers=bool(trials.methods))
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
    choices = _best_layers(passes, calibration, measured)
    calibration = replace(
        calibration,
        layers=tuple(layers for layers, _ in choices),
        agreement=_rounded([agreement for _, agreement in choices]),
    )
    return replace(calibration, adaptive=_adaptive_tables(passes, calibration, trials, measured))


def _adaptive_tables(
    passes: Passes, calibration: Calibration, trials: Trials, measured: Sequence[Measured]
) -> tuple[AdaptiveTable, ...]:
    """How often each method leaves the dense answer unchanged, by keep ratio and spread of CLS's attention."""
    if not trials.methods:
        return ()
    tried = [(method, keep) for method in trials.methods for keep in trials.buckets]
    plans = [passes.plan(method, keep=keep, calibration=calibration) for method, keep in tried]
    same = dict(zip(tried, passes.unchanged(plans, measured).T, strict=True))
    spreads = np.array([values.spread for values in measured])
    # Bins of equally many pairs; a stable order, so that equal spreads fall into the same bins every time.
    bins = np.array_split(np.argsort(spreads, kind="stable"), min(_BINS, len(measured)))
    limits = _rounded([spreads[members].max() for members in bins])
    tables = []
    for method in trials.methods:
        rows = [_rounded([same[method, keep][members].mean() for members in bins]) for keep in trials.buckets]
        tables.append(AdaptiveTable(method, trials.buckets, limits, tuple(rows)))
    return tuple(tables)


def _candidates(num_layers: int) -> list[tuple[int, ...]]:
    """The layer sets to try: SparseVLM's three, scaled; three spaced alike from each early layer; each alone."""
    last, candidates = num_layers - 2, [default_layers(num_layers)]
    for first in range(min(num_layers // 2, last) + 1):
        depth = max(first, 1)
        candidates.append(tuple(sorted({min(layer, last) for layer in (first, 3 * depth, 15 * depth // 2)})))
        candidates.append((first,))
    return list(dict.fromkeys(candidates))


def _best_layers(
    passes: Passes, calibration: Calibration, measured: Sequence[Measured]
) -> list[tuple[tuple[int, ...], float]]:
    """By keep ratio, the layers that keep the dense model's next token likeliest, and how often it stays the next."""
    tried: list[tuple[float, tuple[int, ...]]] = []
    plans: list[PruningPlan] = []
    for keep in KEEPS:
        for layers in _candidates(len(calibration.ranks)):
            options = {"layers": ",".join(map(str, layers))}
            try:
                plans.append(passes.plan("sparsevlm", keep=keep, options=options, calibration=calibration))
            except InputError:  # out of reach with these layers
                continue
            tried.append((keep, layers))
    best = dict.fromkeys(KEEPS, (-np.inf, calibration.layers[0], 0.0))
    chances = passes.chances(plans, measured) if plans else np.zeros((len(measured), 0, 2))
    for (keep, layers), of_plan in zip(tried, chances.transpose(1, 0, 2), strict=True):
        # With equal likelihoods the first candidate wins, so that the choice is reproducible.
        likelihood = float(np.log(of_plan[:, 0] + 1e-9).mean())
        if likelihood > best[keep][0]:
            best[keep] = likelihood, layers, float(of_plan[:, 1].mean())
    return [best[keep][1:] for keep in KEEPS]


def _rounded(values: Any) -> tuple[float, ...]:
    return tuple(float(f"{value:.4g}") for value in values)
