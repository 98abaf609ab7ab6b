"""build: checkpoint -> traced graphs -> compiled bundle, checked against the reference before it gets its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from vtexport.builder.assemble import assemble
from vtexport.builder.engines import Recipe, Source
from vtexport.builder.estimate import Estimate, config_dtype
from vtexport.bundle.folder import Bundle, check_destination
from vtexport.errors import InputError, TargetError
from vtexport.models import Checkpoint, ModelSpec, read_spec, resolve_model
from vtexport.models.checkpoint import AS_STORED, NEAREST, has_weights
from vtexport.models.clip import read_clip
from vtexport.models.names import fingerprint
from vtexport.models.resolve import recipe_dtype, recipe_ranks
from vtexport.models.spec import Asked
from vtexport.progress import Progress, Silent
from vtexport.pruning import DEFAULT_METHOD, adaptive_plans, dense_plan, methods_of, planner
from vtexport.pruning.adaptive import AUTO, DEFAULT_BUCKETS, DEFAULT_TARGET_ACCURACY
from vtexport.pruning.plan import Option
from vtexport.pruning.rank import Calibration
from vtexport.targets import DEFAULT_TARGET, get_target
from vtexport.targets.base import ENGINE_FOLDER, Target

DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class BuildOptions:
    """What `vtexport build` can be told.

    Attributes:
        model: recipe name, folder or hub id.
        keep: share of the visual tokens kept, in (0, 1]; None where a method's options decide it; "auto" to choose it
            for every image.
        buckets: with keep "auto", the keep ratios to choose from; None for `DEFAULT_BUCKETS`.
        target_accuracy: with keep "auto", the share of the dense model's answers that must stay as they are at
            calibration; None for `DEFAULT_TARGET_ACCURACY`.
        method: a key of `vtexport.pruning.METHODS`, or a vision-stage and a decoder-stage method as `a+b`.
        target: a key of `vtexport.targets.TARGETS`.
        dtype: one of `DTYPES` that the target has; None for the recipe's, else the checkpoint's own (bf16 becomes fp16).
        method_options: the method's own options.
        target_options: the target's own options.
        ranks: a calibration file; None takes the recipe's, if it carries one.
        views: what becomes of a prompt's images, where the model leaves a choice.
        give_ranking: also give out how much each visual token was attended to, for `run --ranking-from`.
        debug: also give out scores, raters and clusters.
        verify: run the self-check.
    """

    model: str
    keep: float | str | None = None
    method: str = DEFAULT_METHOD
    target: str = DEFAULT_TARGET
    dtype: str | None = None
    method_options: Mapping[str, Option] = field(default_factory=dict)
    target_options: Mapping[str, str | int] = field(default_factory=dict)
    buckets: tuple[float, ...] | None = None
    target_accuracy: float | None = None
    ranks: Path | None = None
    views: Asked = field(default_factory=Asked)
    give_ranking: bool = False
    debug: bool = False
    verify: bool = True


def build(options: BuildOptions, out: Path, *, force: bool = False, progress: Progress | None = None) -> Bundle:
    """Build a bundle at `out`.

    The bundle is written beside `out` and takes its name at the end; a failed build leaves nothing, and leaves a
    bundle that stood there as it was.

    Raises:
        VtexportError: every way in which the input, the machine or the self-check can say no.
    """
    shown = progress or Silent()
    target = get_target(options.target)
    _check_options(options, target)
    check_destination(out, force)
    folder = resolve_model(options.model)
    spec = read_spec(folder, options.views)
    _check_views(options, spec)
    checkpoint = Checkpoint.open(folder)
    calibration = _calibration(options, checkpoint, spec)
    clip = _clip(options)
    if clip is not None:
        spec = replace(spec, clip=read_clip(clip, spec.vision))
        checkpoint = checkpoint.joined("clip.", Checkpoint.open(clip))
    recipe = _recipe(options, spec, calibration, checkpoint.stored)
    target.check_plans(spec, recipe.plans, {**target.options, **options.target_options})
    source = Source(options.model, folder, folder, checkpoint, spec, clip)
    return assemble(source, recipe, target, options.target_options, out, shown, options.verify)


def dry_run(options: BuildOptions) -> Estimate:
    """What `build` would make, from config.json alone: of a model on the hub no weight is downloaded.

    Raises:
        VtexportError: what `build` would say of the options and the model's configuration.
    """
    target = get_target(options.target)
    _check_options(options, target)
    folder = resolve_model(options.model, config_only=True)
    spec = read_spec(folder, options.views)
    _check_views(options, spec)
    checkpoint = Checkpoint.open(folder) if has_weights(folder) else None
    calibration = _calibration(options, checkpoint, spec)
    clip = _clip(options)
    if clip is not None:
        spec = replace(spec, clip=read_clip(clip, spec.vision))
    stored = config_dtype(spec) if checkpoint is None else checkpoint.stored
    recipe = _recipe(options, spec, calibration, stored)
    target.check_plans(spec, recipe.plans, {**target.options, **options.target_options})
    return Estimate(spec, recipe, target.name, converts=AS_STORED[recipe.dtype] != stored)


def _clip(options: BuildOptions) -> Path | None:
    """The CLIP whose text tower reads the question, for a method that wants one."""
    given = options.method_options.get("clip")
    return resolve_model(str(given)) if methods_of(options.method)[0].reads_question and given else None


def _recipe(options: BuildOptions, spec: ModelSpec, calibration: Calibration | None, stored: str) -> Recipe:
    """Plans and dtype by `options`, for a checkpoint in the safetensors dtype `stored`."""
    plan = partial(planner(spec), options.method, options=options.method_options, calibration=calibration)
    dtype = options.dtype or recipe_dtype(options.model) or NEAREST.get(stored, "fp32")
    if not isinstance(options.keep, str):
        return Recipe([plan(keep=options.keep)], dtype, None, options.debug, options.give_ranking)
    plans, policy = adaptive_plans(
        options.method,
        DEFAULT_BUCKETS if options.buckets is None else options.buckets,
        DEFAULT_TARGET_ACCURACY if options.target_accuracy is None else options.target_accuracy,
        calibration,
        options.method_options,
        lambda keep: plan(keep=keep),
    )
    return Recipe(plans, dtype, policy, options.debug, options.give_ranking)


def _calibration(options: BuildOptions, checkpoint: Checkpoint | None, spec: ModelSpec) -> Calibration | None:
    """The calibration that was asked for or that the recipe carries; refused if it is another model's."""
    _, decoder = methods_of(options.method)
    if options.keep != AUTO and (decoder is None or not decoder.calibrated):
        if options.ranks is None:
            return None
        raise InputError(
            f"--ranks has no effect with method {options.method}, which needs no calibration; leave it out"
        )
    # A recipe's calibration is of its model with one image a prompt.
    path = options.ranks or (recipe_ranks(options.model) if options.views == Asked() else None)
    if path is None:
        return None
    found = Calibration.load(path)
    if checkpoint is None:
        return found
    found.check(path, fingerprint(checkpoint), spec.num_visual_tokens, spec.decoder.num_layers)
    return found


def build_dense_twin(bundle: Bundle, out: Path, progress: Progress | None = None) -> Bundle:
    """Build at `out` the dense bundle of the same model, target and dtype, from `bundle`'s own weights.

    It is not checked against transformers: the weights of layers that no engine runs are not in a bundle.

    Raises:
        InputError: `bundle` is dense itself, or its target keeps weights inside its engines.
    """
    manifest = bundle.manifest
    plans = manifest.pruning_plans()
    if not plans[0].stages:
        raise InputError(f"{bundle.folder} is dense itself; give another bundle to compare it with")
    weights = sorted((bundle.folder / ENGINE_FOLDER).glob("*.safetensors"))
    if not weights:
        raise InputError(
            f"{bundle.folder} holds compiled engines, not weights; build a dense bundle and give its folder"
        )
    spec = bundle.spec()
    checkpoint = Checkpoint.of_files(bundle.folder, weights)
    source = Source(manifest.model.name, bundle.folder, bundle.processor_folder, checkpoint, spec)
    recipe = Recipe([dense_plan(plans[0])], manifest.target.dtype)
    target = get_target(manifest.target.name)
    return assemble(source, recipe, target, manifest.target.options, out, progress or Silent(), verify=False)


def _check_views(options: BuildOptions, spec: ModelSpec) -> None:
    """Refuse what is only defined for one view of one image."""
    if spec.views.total > 1 and options.keep == AUTO:
        raise InputError("--keep auto goes by one view's CLS attention, and this build has several views; give a ratio")
    if not spec.vision.class_token and options.keep == AUTO:
        raise InputError(f"--keep auto goes by CLS's attention, and {spec.vision.kind} has no CLS token; give a ratio")
    if spec.views.counted and options.give_ranking:
        raise InputError(
            "--give-ranking ranks the tokens of one image of one size; this build's prompts differ in them"
        )


def _check_options(options: BuildOptions, target: Target) -> None:
    if options.dtype is not None and options.dtype not in target.dtypes:
        raise InputError(
            f"target {target.name} has no dtype {options.dtype!r}; choose one of {', '.join(target.dtypes)}"
        )
    for name in options.target_options:
        if name not in target.options:
            raise InputError(f"--{name.replace('_', '-')} has no effect with target {target.name}; leave it out")
    vision, decoder = methods_of(options.method)
    if options.keep == AUTO:
        if decoder is not None and decoder.raters == "given":
            raise InputError(f"--keep auto cannot go with method {options.method}, whose tokens another bundle ranks")
    elif isinstance(options.keep, str):
        raise InputError(f"--keep {options.keep!r} is neither a ratio nor auto")
    else:
        for flag, value in (("buckets", options.buckets), ("target-accuracy", options.target_accuracy)):
            if value is not None:
                raise InputError(f"--{flag} has no effect without --keep auto; leave it out")
    if options.debug and not (vision.scores or (decoder is not None and decoder.scores)):
        raise InputError(f"--debug has no effect with method {options.method}, which rates no tokens; leave it out")
    if options.give_ranking and options.method != "dense":
        raise InputError(f"--give-ranking ranks every visual token, but method {options.method} drops some; use dense")
    available = target.can_build()
    if not available.works:
        raise TargetError(f"target {target.name} cannot build here: {available.reason}")
    target.check_options({**target.options, **options.target_options})
    if options.dtype == "bf16" and options.target_options.get("quantize"):
        raise InputError("--quantize rounds weights in fp16 or fp32, not bf16; give another --dtype")
