"""build: checkpoint -> traced graphs -> compiled bundle, checked against the reference before it gets its name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from vtexport.builder.assemble import assemble
from vtexport.builder.engines import EngineSpec, Source
from vtexport.builder.estimate import Estimate, config_dtype
from vtexport.builder.options import BuildOptions
from vtexport.bundle.folder import Bundle
from vtexport.bundle.writing import check_destination
from vtexport.errors import InputError
from vtexport.models import Checkpoint, ModelSpec, read_spec, resolve_model
from vtexport.models.checkpoint import AS_STORED, NEAREST, has_weights
from vtexport.models.clip import read_clip
from vtexport.models.names import fingerprint
from vtexport.models.resolve import recipe_calibration, recipe_dtype
from vtexport.models.spec import ViewChoice
from vtexport.progress import Progress, Silent
from vtexport.pruning import Geometry, PruningPlan, adaptive_plans, dense_plan, make_plan
from vtexport.pruning.adaptive import DEFAULT_BUCKETS, DEFAULT_TARGET_ACCURACY
from vtexport.pruning.calibration import Calibration
from vtexport.targets.base import ENGINE_FOLDER


def build(options: BuildOptions, out: Path | str, *, force: bool = False, progress: Progress | None = None) -> Bundle:
    """Build a bundle at `out`.

    The bundle is written beside `out` and takes its name at the end; a failed build leaves nothing, and leaves a
    bundle that stood there as it was.

    Args:
        options: what to build.
        out: the folder to write.
        force: replace a bundle that stands at `out`.
        progress: where to report; None for nowhere.

    Raises:
        VtexportError: every way in which the input, the machine or the self-check can say no.
    """
    out = Path(out)
    options.check()
    check_destination(out, force)
    model = _open(options, config_only=False)
    assert model.checkpoint is not None, "a model opened with its weights has a checkpoint"
    engines = _engine_spec(options, model)
    source = Source(options.model, model.folder, model.folder, model.checkpoint, model.spec, model.clip)
    target = options.chosen_target
    return assemble(source, engines, target, out, progress or Silent(), self_check=options.self_check)


def dry_run(options: BuildOptions) -> Estimate:
    """What `build` would make, from config.json alone: of a model on the hub no weight is downloaded.

    Raises:
        VtexportError: what `build` would say of the options and the model's configuration.
    """
    options.check()
    model = _open(options, config_only=True)
    engines = _engine_spec(options, model)
    return Estimate(model.spec, engines, options.chosen_target, converts=AS_STORED[engines.dtype] != model.stored)


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
    checkpoint = Checkpoint.of_files(bundle.folder, weights)
    source = Source(manifest.model.name, bundle.folder, bundle.processor_folder, checkpoint, bundle.spec())
    engines = EngineSpec([dense_plan(plans[0])], manifest.target.dtype)
    return assemble(source, engines, bundle.target(), out, progress or Silent(), self_check=False)


@dataclass(frozen=True)
class _Model:
    """What a build is of: folder, geometry, weights (None where only the configuration is there), a CLIP's folder."""

    folder: Path
    spec: ModelSpec
    checkpoint: Checkpoint | None
    clip: Path | None

    @property
    def stored(self) -> str:
        """The safetensors dtype of the weights."""
        return config_dtype(self.spec) if self.checkpoint is None else self.checkpoint.stored


def _open(options: BuildOptions, *, config_only: bool) -> _Model:
    """The model that `options` name, and the CLIP beside it for a method that reads the question."""
    folder = resolve_model(options.model, config_only=config_only)
    spec = read_spec(folder, options.views)
    _check_views(options, spec)
    checkpoint = None if config_only and not has_weights(folder) else Checkpoint.open(folder)
    companion = options.methods.vision.companion
    if not companion:
        return _Model(folder, spec, checkpoint, None)
    clip = resolve_model(companion)
    spec = replace(spec, clip=read_clip(clip, spec.vision))
    joined = None if checkpoint is None else checkpoint.joined("clip.", Checkpoint.open(clip))
    return _Model(folder, spec, joined, clip)


def _engine_spec(options: BuildOptions, model: _Model) -> EngineSpec:
    """Plans and dtype by `options`; refused if the target has no place for them."""
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
    options.chosen_target.check_plans(model.spec, plans)
    return EngineSpec(plans, dtype, policy, options.debug, options.give_ranking)


def _calibration(options: BuildOptions, model: _Model) -> Calibration | None:
    """The calibration that was asked for or that the recipe carries; refused if it is another model's."""
    if not options.adaptive and not any(part.calibrated for part in options.parts):
        if options.calibration is None:
            return None
        raise InputError(f"--calibration has no effect with method {options.method}, which needs none; leave it out")
    # A recipe's calibration is of its model with one image per prompt.
    own = recipe_calibration(options.model) if options.views == ViewChoice() else None
    path = options.calibration or own
    if path is None:
        return None
    calibration = Calibration.load(path)
    if model.checkpoint is not None:
        spec = model.spec
        calibration.check(path, fingerprint(model.checkpoint), spec.num_visual_tokens, spec.decoder.num_layers)
    return calibration


def _check_views(options: BuildOptions, spec: ModelSpec) -> None:
    """Refuse what is only defined for one view of one image."""
    if options.adaptive and spec.views.total > 1:
        raise InputError("--keep auto goes by one view's CLS attention, and this build has several views; give a ratio")
    if options.adaptive and not spec.vision.class_token:
        raise InputError(f"--keep auto goes by CLS attention, and {spec.vision.kind} has no CLS token; give a ratio")
    if spec.views.counted and options.give_ranking:
        raise InputError(
            "--give-ranking ranks the tokens of one image of one size; this build's prompts differ in them"
        )
