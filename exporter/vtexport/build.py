"""build: checkpoint -> traced graphs -> compiled bundle, checked against the reference before it gets its name."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vtexport.bundle import (
    PROCESSOR_FOLDER,
    Bundle,
    check_destination,
    check_space,
    list_files,
    write_folder,
)
from vtexport.errors import InputError, TargetError
from vtexport.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    AdaptiveEntry,
    GraphEntry,
    Manifest,
    ModelEntry,
    PlanEntry,
    PortEntry,
    TargetEntry,
    VerificationEntry,
    encode,
)
from vtexport.models import Checkpoint, ModelSpec, read_spec, resolve_model
from vtexport.models.clip import FOLDER as CLIP_FOLDER
from vtexport.models.clip import ClipTokenizer, read_clip
from vtexport.models.llava import fingerprint
from vtexport.models.prompt import PROCESSOR_FILES
from vtexport.models.resolve import recipe_ranks
from vtexport.pruning import DEFAULT_METHOD, PruningPlan, adaptive_plans, dense_plan, methods_of, planner
from vtexport.pruning.adaptive import AUTO, DEFAULT_BUCKETS, DEFAULT_TARGET_ACCURACY, Policy
from vtexport.pruning.plan import Option
from vtexport.pruning.rank import Calibration
from vtexport.targets import DEFAULT_TARGET, get_target
from vtexport.targets.base import (
    WEIGHTS_FILE,
    Compiled,
    CompileJob,
    Engine,
    Target,
    graph_folder,
    graph_names,
    prefill_names,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtexport.graph.export import TracedGraph

DTYPES = ("fp32", "fp16")


class Progress(Protocol):
    """Where a build reports; `vtexport.console` shows it, `Silent` does not."""

    def stage(self, text: str, total: int | None = None) -> None:
        """A new stage of `total` steps (None: unknown)."""

    def advance(self, steps: int = 1) -> None:
        """Steps of the current stage that were done."""

    def warn(self, text: str) -> None:
        """A warning for the user."""


class Silent:
    """A `Progress` that shows nothing."""

    def stage(self, text: str, total: int | None = None) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def warn(self, text: str) -> None: ...


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
        dtype: "fp32" or "fp16".
        method_options: the method's own options.
        target_options: the target's own options.
        ranks: a calibration file; None takes the recipe's, if it carries one.
        give_ranking: also give out how much each visual token was attended to, for `run --ranking-from`.
        debug: also give out scores, raters and clusters.
        verify: run the self-check.
    """

    model: str
    keep: float | str | None = None
    method: str = DEFAULT_METHOD
    target: str = DEFAULT_TARGET
    dtype: str = "fp32"
    method_options: Mapping[str, Option] = field(default_factory=dict)
    target_options: Mapping[str, str | int] = field(default_factory=dict)
    buckets: tuple[float, ...] | None = None
    target_accuracy: float | None = None
    ranks: Path | None = None
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
    spec = read_spec(folder)
    checkpoint = Checkpoint.open(folder)
    calibration = _calibration(options, checkpoint, spec)
    clip = None
    if methods_of(options.method)[0].reads_question and options.method_options.get("clip"):
        clip = resolve_model(str(options.method_options["clip"]))
        spec = replace(spec, clip=read_clip(clip, spec.vision))
        checkpoint = checkpoint.joined("clip.", Checkpoint.open(clip))
    plan = partial(planner(spec), options.method, options=options.method_options, calibration=calibration)
    source = _Source(options.model, folder, folder, checkpoint, spec, clip)
    if not isinstance(options.keep, str):
        return _assemble(source, [plan(keep=options.keep)], None, target, options, out, shown)
    plans, policy = adaptive_plans(
        options.method,
        DEFAULT_BUCKETS if options.buckets is None else options.buckets,
        DEFAULT_TARGET_ACCURACY if options.target_accuracy is None else options.target_accuracy,
        calibration,
        options.method_options,
        lambda keep: plan(keep=keep),
    )
    return _assemble(source, plans, policy, target, options, out, shown)


def _calibration(options: BuildOptions, checkpoint: Checkpoint, spec: ModelSpec) -> Calibration | None:
    """The calibration that was asked for or that the recipe carries; refused if it is another model's."""
    _, decoder = methods_of(options.method)
    if options.keep != AUTO and (decoder is None or not decoder.calibrated):
        if options.ranks is None:
            return None
        raise InputError(
            f"--ranks has no effect with method {options.method}, which needs no calibration; leave it out"
        )
    path = options.ranks or recipe_ranks(options.model)
    if path is None:
        return None
    found = Calibration.load(path)
    found.check(path, fingerprint(checkpoint), spec.vision.num_visual_tokens, spec.decoder.num_layers)
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
    weights = [bundle.folder / place / WEIGHTS_FILE for place in ("vision", "decoder")]
    if not all(path.is_file() for path in weights):
        raise InputError(
            f"{bundle.folder} holds compiled engines, not weights; build a dense bundle and give its folder"
        )
    spec = read_spec(bundle.processor_folder)
    checkpoint = Checkpoint.of_files(bundle.folder, weights)
    source = _Source(manifest.model.name, bundle.folder, bundle.processor_folder, checkpoint, spec)
    options = BuildOptions(
        model=manifest.model.name,
        keep=1.0,
        method="dense",
        target=manifest.target.name,
        dtype=manifest.target.dtype,
        target_options=manifest.target.options,
        verify=False,
    )
    return _assemble(
        source, [dense_plan(plans[0])], None, get_target(options.target), options, out, progress or Silent()
    )


@dataclass(frozen=True)
class _Source:
    """What a bundle is made from: the model's name, its folder, its processor's, weights, geometry, a CLIP's folder."""

    name: str
    folder: Path
    processor: Path
    checkpoint: Checkpoint
    spec: ModelSpec
    clip: Path | None = None


def _assemble(
    source: _Source,
    plans: Sequence[PruningPlan],
    policy: Policy | None,
    target: Target,
    options: BuildOptions,
    out: Path,
    shown: Progress,
) -> Bundle:
    spec = source.spec
    check_space(out, _needed_bytes(spec, options.dtype))
    resolved = {**target.options, **options.target_options}
    with write_folder(out) as building:
        graphs = _trace(spec, plans, options, shown)
        _write_weights(graphs, building, source.checkpoint, spec, plans, shown)
        _copy_processor(source, building)
        ports = {graph.name: _ports(graph) for graph in graphs}
        compiled = target.compile(
            CompileJob(
                folder=building,
                models={graph.name: graph.model for graph in graphs},
                spec=spec,
                plans=plans,
                dtype=options.dtype,
                options=resolved,
                report=shown.stage,
                advance=shown.advance,
                warn=shown.warn,
            )
        )
        verification = None
        if options.verify:
            verification = _verify(target, compiled, building, source, plans, options, shown)
        target.finish(building, compiled)
        shown.stage("hash files")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            vtexport=version("vtexport"),
            model=_model_entry(source.name, spec),
            plans=[PlanEntry.of(plan) for plan in plans],
            adaptive=None if policy is None else AdaptiveEntry(**asdict(policy)),
            target=TargetEntry(
                name=target.name,
                dtype=options.dtype,
                options=resolved,
                versions=dict(compiled.versions),
                facts=dict(compiled.facts),
                graphs=dict(compiled.files),
            ),
            graphs=ports,
            debug=options.debug,
            gives_ranking=options.give_ranking,
            verification=verification,
            files=list_files(building),
        )
        (building / MANIFEST).write_bytes(encode(manifest))
    return Bundle.open(out)


def _check_options(options: BuildOptions, target: Target) -> None:
    if options.dtype not in target.dtypes:
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


def _needed_bytes(spec: ModelSpec, dtype: str) -> int:
    """Weights once, and a tenth for graphs, engines' own data and processor files."""
    return int(spec.num_parameters() * (4 if dtype == "fp32" else 2) * 1.1) + (4 << 20)


def _trace(
    spec: ModelSpec, plans: Sequence[PruningPlan], options: BuildOptions, progress: Progress
) -> list[TracedGraph]:
    from vtexport.graph.export import trace_decode, trace_prefill, trace_vision

    names = prefill_names(len(plans))
    progress.stage(f"trace {', '.join(graph_names(len(plans)))}", len(plans) + 2)
    graphs = [trace_vision(spec, plans, options.dtype, options.debug)]
    progress.advance()
    for plan, name in zip(plans, names, strict=True):
        graphs.append(trace_prefill(spec, plan, options.dtype, options.debug, options.give_ranking, name))
        progress.advance()
    ranks = spec.vision.num_visual_tokens if options.give_ranking else 0
    graphs.append(trace_decode(spec, options.dtype, ranks))
    progress.advance()
    return graphs


def _write_weights(
    graphs: list[TracedGraph],
    building: Path,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    plans: Sequence[PruningPlan],
    progress: Progress,
) -> None:
    from vtexport.graph.weights import weights_size, write_weights
    from vtexport.models.llava import rope_tables

    cos, sin = rope_tables(spec)
    computed = {"rope.cos": cos.numpy(), "rope.sin": sin.numpy()}
    for number, plan in enumerate(plans):
        constants = methods_of(plan.method)[0].constants(plan, spec.vision.grid)
        computed |= {f"pruning.{number}.{name}": array for name, array in constants.items()}
    groups: dict[str, list[ir.Model]] = {}
    for graph in graphs:
        groups.setdefault(graph_folder(graph.name), []).append(graph.model)
    progress.stage("write weights", sum(weights_size(models) for models in groups.values()))
    for place, models in groups.items():
        (building / place).mkdir()
        write_weights(models, building / place, checkpoint, computed, progress.advance)


def _copy_processor(source: _Source, building: Path) -> None:
    place = building / PROCESSOR_FOLDER
    place.mkdir()
    for name in PROCESSOR_FILES:
        if (source.processor / name).is_file():
            shutil.copyfile(source.processor / name, place / name)
    if source.clip is not None and source.spec.clip is not None:
        # Its tokenizer may be in any of several forms: written anew, it is in the newest.
        ClipTokenizer(source.clip, source.spec.clip.length).tokenizer.save_pretrained(place / CLIP_FOLDER)
        shutil.copyfile(source.clip / "config.json", place / CLIP_FOLDER / "config.json")


def _ports(graph: TracedGraph) -> GraphEntry:
    def entry(value: object) -> PortEntry:
        shape = [extent if isinstance(extent, int) else str(extent.value) for extent in value.shape]  # type: ignore[attr-defined]
        return PortEntry(value.name, str(value.dtype.name).lower(), shape)  # type: ignore[attr-defined]

    model = graph.model.graph
    return GraphEntry([entry(v) for v in model.inputs], [entry(v) for v in model.outputs])


def _model_entry(name: str, spec: ModelSpec) -> ModelEntry:
    return ModelEntry(
        name=name,
        family=spec.family,
        config=spec.config,
        image_token_id=spec.image_token_id,
        eos_token_ids=list(spec.eos_token_ids),
        image_size=spec.vision.image_size,
        grid=spec.vision.grid,
        vocabulary=spec.decoder.vocab_size,
        max_positions=spec.decoder.max_positions,
    )


def _verify(
    target: Target,
    compiled: Compiled,
    building: Path,
    source: _Source,
    plans: Sequence[PruningPlan],
    options: BuildOptions,
    progress: Progress,
) -> VerificationEntry:
    from vtexport.verify import SAMPLES, Checked, verify_engine

    progress.stage("verify against transformers", SAMPLES * len(plans))
    engine, ran = _verifiable(target, compiled, building)
    model = Checked(source.folder, source.spec, source.clip)
    return verify_engine(engine, ran, model, plans, options.dtype, progress.advance)


def _verifiable(target: Target, compiled: Compiled, building: Path) -> tuple[Engine, str]:
    """The compiled engine, or where it cannot run here, the ONNX files it was compiled from."""
    if target.can_run().works:
        return target.open(building, compiled, 0), target.name
    from vtexport.targets.onnxruntime.session import OrtEngine

    sources = {name: f"{graph_folder(name)}/{name}.onnx" for name in compiled.files}
    return OrtEngine(building, sources), f"the ONNX files of {target.name}, on onnxruntime"
