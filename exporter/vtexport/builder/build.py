"""build: turns a checkpoint and options into a compiled bundle that is checked against the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from vtexport.builder.assemble import assemble
from vtexport.builder.engines import EngineSpec, Source
from vtexport.builder.estimate import Estimate, config_dtype
from vtexport.builder.options import BuildOptions
from vtexport.bundle.folder import Bundle
from vtexport.bundle.writing import check_destination
from vtexport.errors import InputError
from vtexport.models import Checkpoint, ModelSpec, read_spec, resolve_model
from vtexport.models.checkpoint import AS_STORED, NEAREST, has_weights
from vtexport.models.clip import ClipTokenizer, read_clip
from vtexport.models.names import fingerprint
from vtexport.models.needed import check_weights
from vtexport.models.prompt import Prompter
from vtexport.models.resolve import recipe_calibration, recipe_dtype
from vtexport.models.spec import ViewChoice
from vtexport.progress import Progress, Silent
from vtexport.pruning import Geometry, PruningPlan, adaptive_plans, dense_plan, make_plan
from vtexport.pruning.adaptive import DEFAULT_BUCKETS, DEFAULT_TARGET_ACCURACY
from vtexport.pruning.calibration import Calibration
from vtexport.pruning.vision import VisionMethod
from vtexport.targets.base import ENGINE_FOLDER

# Visual tokens of a prompt before pruning, far beyond what any vision tower was trained with.
_MOST_VISUAL = 1 << 17
_BEFORE_DECODER = "fastervlm"


def build(options: BuildOptions, out: Path | str, *, force: bool = False, progress: Progress | None = None) -> Bundle:
    """Build a bundle at `out`.

    The bundle is written beside `out` and renamed at the end. A failed build leaves nothing behind, and an existing
    bundle as it was.

    Args:
        options: what to build.
        out: the folder to write.
        force: replace an existing bundle at `out`.
        progress: where to report; None for nowhere.

    Raises:
        VtexportError: the input is wrong, this machine cannot build it, or the self-check fails.
    """
    out = Path(out)
    options.check()
    check_destination(out, force)
    model = _open(options, config_only=False)
    assert model.checkpoint is not None, "a model opened with its weights has a checkpoint"
    _try_processor(model)
    engines = _engine_spec(options, model)
    source = Source(options.model, model.folder, model.folder, model.checkpoint, model.spec, model.clip)
    target = options.chosen_target
    return assemble(source, engines, target, out, progress or Silent(), self_check=options.self_check, force=force)


def dry_run(options: BuildOptions) -> Estimate:
    """Estimate what `build` would make, from config.json alone; no weights are downloaded from the hub.

    Raises:
        VtexportError: `build` would refuse the options or the model's configuration.
    """
    options.check()
    model = _open(options, config_only=True)
    engines = _engine_spec(options, model)
    return Estimate(model.spec, engines, options.chosen_target, converts=AS_STORED[engines.dtype] != model.stored)


def build_dense_twin(bundle: Bundle, out: Path, progress: Progress | None = None) -> Bundle:
    """Build the dense bundle of the same model, target and dtype at `out`, from `bundle`'s own weights.

    There is no self-check: transformers also needs the weights of layers that no engine runs, which no bundle holds.

    Raises:
        InputError: see `check_twin`.
    """
    check_twin(bundle, "dense")
    return _twin(bundle, dense_plan(bundle.manifest.pruning_plans()[0]), out, progress)


def build_random_twin(bundle: Bundle, keep: float, out: Path, progress: Progress | None = None) -> Bundle:
    """As `build_dense_twin`, a bundle of method `random` at keep ratio `keep`.

    Raises:
        InputError: see `check_twin`; or a ratio that leaves no token.
    """
    check_twin(bundle, "random")
    return _twin(bundle, make_plan("random", Geometry.of(bundle.spec()), keep=keep), out, progress)


def check_twin(bundle: Bundle, method: str) -> None:
    """Refuse a bundle of which no twin of `method`, dense or random, can be built, or none that differs from it.

    Raises:
        InputError: it is such a bundle itself, it prunes nothing, or its target keeps weights inside its engines.
    """
    plan = bundle.manifest.pruning_plans()[0]
    if not plan.stages or plan.method == method:
        itself = method if plan.method == method else "dense"
        raise InputError(f"{bundle.folder} is {itself} itself; give another bundle to compare it with")
    if not _weights(bundle):
        raise InputError(
            f"{bundle.folder} holds compiled engines, not weights; build a {method} bundle and give its folder"
        )


def _weights(bundle: Bundle) -> list[Path]:
    return sorted((bundle.folder / ENGINE_FOLDER).glob("*.safetensors"))


def _twin(bundle: Bundle, plan: PruningPlan, out: Path, progress: Progress | None) -> Bundle:
    """The bundle of the same model, target and dtype with another plan."""
    manifest = bundle.manifest
    checkpoint = Checkpoint.of_files(bundle.folder, _weights(bundle))
    source = Source(manifest.model.name, bundle.folder, bundle.processor_folder, checkpoint, bundle.spec())
    engines = EngineSpec([plan], manifest.target.dtype)
    return assemble(source, engines, bundle.target(), out, progress or Silent(), self_check=False)


@dataclass(frozen=True)
class _Model:
    """The model to build: folder, geometry, weights (None with config.json alone), and a CLIP's folder or None."""

    folder: Path
    spec: ModelSpec
    checkpoint: Checkpoint | None
    clip: Path | None

    @property
    def stored(self) -> str:
        """The safetensors dtype of the weights."""
        return config_dtype(self.spec) if self.checkpoint is None else self.checkpoint.stored


def _open(options: BuildOptions, *, config_only: bool) -> _Model:
    """Open the model that `options` name, and a CLIP for a method that reads the question."""
    folder = resolve_model(options.model, config_only=config_only)
    spec = read_spec(folder, options.views)
    _check_views(options, spec)
    _check_length(options, spec)
    checkpoint = None if config_only and not has_weights(folder) else Checkpoint.open(folder)
    companion, clip = options.methods.vision.companion, None
    if companion:
        clip = resolve_model(companion)
        spec = replace(spec, clip=read_clip(clip, spec.vision))
        checkpoint = None if checkpoint is None else checkpoint.joined("clip.", Checkpoint.open(clip))
    if checkpoint is not None:
        check_weights(checkpoint, spec)
    return _Model(folder, spec, checkpoint, clip)


def _engine_spec(options: BuildOptions, model: _Model) -> EngineSpec:
    """The plans and dtype that `options` ask for; plans that the target does not support are refused."""
    calibration, geometry = _calibration(options, model), Geometry.of(model.spec)
    dtype = options.dtype or recipe_dtype(options.model) or NEAREST.get(model.stored, "fp32")

    def plan(keep: float | None) -> PruningPlan:
        return make_plan(options.method, geometry, keep=keep, options=options.method_options, calibration=calibration)

    if isinstance(options.keep, str):
        plans, policy = adaptive_plans(
            options.method,
            sorted(options.buckets or DEFAULT_BUCKETS, reverse=True),
            DEFAULT_TARGET_ACCURACY if options.target_accuracy is None else options.target_accuracy,
            calibration,
            options.method_options,
            plan,
        )
    else:
        plans, policy = [plan(options.keep)], None
    for made in plans:
        _check_positions(options, model.spec, made.vision_tokens)
    plans = list(options.chosen_target.planned(plans))
    options.chosen_target.check_plans(model.spec, plans)
    return EngineSpec(plans, dtype, policy, options.debug, options.give_ranking)


def _try_processor(model: _Model) -> None:
    """Refuse a tokenizer, chat template or image processor that cannot be used, before the work that needs none."""
    prompter = Prompter(model.folder, model.spec)
    prompter.prompt("what is it?")
    if model.clip is not None and model.spec.clip is not None:
        ClipTokenizer(model.clip, model.spec.clip.length, model.spec.clip.vocab_size).ids("what is it?")


def _calibration(options: BuildOptions, model: _Model) -> Calibration | None:
    """The calibration in `options`, else the recipe's; it is refused if it belongs to another model."""
    if not options.adaptive and not any(part.calibrated for part in options.parts):
        if options.calibration is None:
            return None
        raise InputError(f"--calibration has no effect with method {options.method}, which needs none; leave it out")
    # A recipe's calibration was measured with one image per prompt.
    from_recipe = recipe_calibration(options.model) if options.views == ViewChoice() else None
    path = options.calibration or from_recipe
    if path is None:
        return None
    calibration = Calibration.load(path)
    if model.checkpoint is not None:
        spec = model.spec
        calibration.check(path, fingerprint(model.checkpoint), spec.num_visual_tokens, spec.decoder.num_layers)
    return calibration


def _check_views(options: BuildOptions, spec: ModelSpec) -> None:
    """Refuse options that are defined for one view of one image only."""
    if options.adaptive and spec.views.total > 1:
        raise InputError("--keep auto goes by one view's CLS attention, and this build has several views; give a ratio")
    if options.adaptive and not spec.vision.class_token:
        raise InputError(f"--keep auto goes by CLS attention, and {spec.vision.kind} has no CLS token; give a ratio")
    if spec.views.counted and options.give_ranking:
        raise InputError(
            "--give-ranking needs one image of one size per prompt, but this build allows others; leave it out"
        )


def _check_length(options: BuildOptions, spec: ModelSpec) -> None:
    """Refuse prompts whose visual tokens are too many for the model, as far as that is known before plans are made."""
    tokens = spec.num_visual_tokens
    # A plan keeps its ratio as the mean over the decoder's layers, so that no fewer tokens enter the first of them.
    ratios = (options.buckets or DEFAULT_BUCKETS) if options.adaptive else (options.keep or 0,)
    prunes = any(issubclass(part, VisionMethod) and part.name != "dense" for part in options.parts)
    least = math.ceil(tokens * min(float(ratio) for ratio in ratios)) if prunes else tokens
    if tokens > _MOST_VISUAL:
        _refuse_length(
            options, spec, f"{tokens} visual tokens per prompt are more than the {_MOST_VISUAL} of any build"
        )
    _check_positions(options, spec, least)


def _check_positions(options: BuildOptions, spec: ModelSpec, entering: int) -> None:
    """Refuse `entering` visual tokens that leave the decoder no position for a question and an answer."""
    most = spec.decoder.max_positions
    if entering + 2 > most:
        _refuse_length(options, spec, f"{entering} visual tokens enter the decoder, which has {most} positions")


def _refuse_length(options: BuildOptions, spec: ModelSpec, trouble: str) -> NoReturn:
    ways = []
    if spec.views.images > 1:
        ways.append("fewer --images")
    if spec.views.tiles is not None and spec.views.tiles != (1, 1):
        ways.append("a smaller --grid")
    if any(issubclass(part, VisionMethod) and part.name != "dense" for part in options.parts):
        ways.append("a smaller --keep")
    else:
        ways.append(f"a --method that prunes before the decoder, such as {_BEFORE_DECODER}")
    raise InputError(f"{trouble}; give {' or '.join(ways)}")
