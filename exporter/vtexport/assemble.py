"""A checkpoint and its plans -> the files of a bundle: traced graphs, weights, compiled engines, processor, manifest."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from vtexport.bundle import PROCESSOR_FOLDER, Bundle, Hashes, check_space, same_file_system, write_folder
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
    ViewsEntry,
    encode,
)
from vtexport.models import Checkpoint, ModelSpec
from vtexport.models.checkpoint import AS_STORED
from vtexport.models.clip import FOLDER as CLIP_FOLDER
from vtexport.models.clip import ClipTokenizer
from vtexport.models.prompt import PROCESSOR_FILES
from vtexport.progress import Progress
from vtexport.pruning import PruningPlan, methods_of
from vtexport.pruning.adaptive import Policy
from vtexport.targets.base import ENGINE_FOLDER, Compiled, CompileJob, Target, graph_names, prefill_names

if TYPE_CHECKING:
    from vtexport.graph.export import TracedGraph
    from vtexport.graph.weights import Lazy


@dataclass(frozen=True)
class Source:
    """What a bundle is made from: the model's name, its folder, its processor's, weights, geometry, a CLIP's folder."""

    name: str
    folder: Path
    processor: Path
    checkpoint: Checkpoint
    spec: ModelSpec
    clip: Path | None = None


@dataclass(frozen=True)
class Recipe:
    """How graphs are made of a source: plans (several are a choice per image, by `policy`), dtype, extra outputs."""

    plans: Sequence[PruningPlan]
    dtype: str
    policy: Policy | None = None
    debug: bool = False
    give_ranking: bool = False


@dataclass(frozen=True)
class Made:
    """What `make_engines` left in a folder, and the ports of its graphs."""

    compiled: Compiled
    ports: Mapping[str, GraphEntry]


def make_engines(
    source: Source, recipe: Recipe, target: Target, options: Mapping[str, str | int], folder: Path, progress: Progress
) -> Made:
    """Trace, write weights and compile into `folder / ENGINE_FOLDER`; what only compiling needed is still there."""
    graphs = _trace(source.spec, recipe, target.vision_only, progress)
    ports = {graph.name: _ports(graph) for graph in graphs}
    scheme = target.scheme(options)
    encoded: Mapping[str, Lazy] = {}
    if scheme is not None:
        from vtexport.targets.quantize import quantize

        encoded = quantize([graph.model for graph in graphs], scheme)
    _write_weights(graphs, folder, source, recipe.plans, encoded, progress)
    compiled = target.compile(
        CompileJob(
            folder=folder,
            models={graph.name: graph.model for graph in graphs},
            spec=source.spec,
            plans=recipe.plans,
            dtype=recipe.dtype,
            options=options,
            report=progress.stage,
            advance=progress.advance,
            warn=progress.warn,
        )
    )
    return Made(compiled, ports)


def assemble(
    source: Source,
    recipe: Recipe,
    target: Target,
    target_options: Mapping[str, str | int],
    out: Path,
    progress: Progress,
    verify: bool,
) -> Bundle:
    """Write the bundle `out`, checked against the reference before it gets its name unless `verify` is False."""
    from vtexport.selfcheck import check_engines

    options = {**target.options, **target_options}
    check_space(out, _needed_bytes(source, recipe, target, out))
    with write_folder(out) as building, contextlib.ExitStack() as stack:
        made = make_engines(source, recipe, target, options, building, progress)
        _copy_processor(source, building)
        hashes = stack.enter_context(Hashes(building))
        verification = (
            check_engines(source, recipe, target, options, made.compiled, building, progress) if verify else None
        )
        target.finish(building, made.compiled)
        progress.stage("hash files")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            vtexport=version("vtexport"),
            model=_model_entry(source),
            plans=[PlanEntry.of(plan) for plan in recipe.plans],
            adaptive=None if recipe.policy is None else AdaptiveEntry(**asdict(recipe.policy)),
            target=TargetEntry(
                name=target.name,
                dtype=recipe.dtype,
                options=options,
                versions=dict(made.compiled.versions),
                facts=dict(made.compiled.facts),
                graphs=dict(made.compiled.files),
            ),
            graphs=dict(made.ports),
            debug=recipe.debug,
            gives_ranking=recipe.give_ranking,
            verification=verification,
            files=hashes.entries(),
        )
        (building / MANIFEST).write_bytes(encode(manifest))
    return Bundle.open(out)


def _needed_bytes(source: Source, recipe: Recipe, target: Target, out: Path) -> int:
    """What the bundle takes on disk besides what is hard-linked, at its fullest, and some room for graphs."""
    weights = source.spec.weight_bytes(recipe.dtype)
    linked = source.checkpoint.stored == AS_STORED[recipe.dtype] and same_file_system(source.checkpoint.folder, out)
    # Of plans, prefill and decode each hold the decoder.
    inside = 2 * weights if target.weights_inside else 0
    return int(1.1 * ((0 if linked else weights) + inside)) + (16 << 20)


def _trace(spec: ModelSpec, recipe: Recipe, vision_only: bool, progress: Progress) -> list[TracedGraph]:
    from vtexport.graph.export import trace_decode, trace_prefill, trace_vision

    if vision_only:
        progress.stage("trace vision")
        return [trace_vision(spec, recipe.plans, recipe.dtype, recipe.debug)]
    number = len(recipe.plans)
    progress.stage(f"trace {', '.join(graph_names(number))}", number + 2)
    graphs = [trace_vision(spec, recipe.plans, recipe.dtype, recipe.debug)]
    progress.advance()
    for plan, name in zip(recipe.plans, prefill_names(number), strict=True):
        graphs.append(trace_prefill(spec, plan, recipe.dtype, recipe.debug, recipe.give_ranking, name))
        progress.advance()
    ranks = spec.num_visual_tokens if recipe.give_ranking else 0
    graphs.append(trace_decode(spec, recipe.dtype, ranks))
    progress.advance()
    return graphs


def _write_weights(
    graphs: Sequence[TracedGraph],
    folder: Path,
    source: Source,
    plans: Sequence[PruningPlan],
    encoded: Mapping[str, Lazy],
    progress: Progress,
) -> None:
    from vtexport.graph.weights import Weights
    from vtexport.models.rope import rope_tables

    cos, sin = rope_tables(source.spec)
    computed = {"rope.cos": cos.numpy(), "rope.sin": sin.numpy(), **encoded}
    for number, plan in enumerate(plans):
        constants = methods_of(plan.method)[0].constants(plan, source.spec.vision.grid)
        computed |= {f"pruning.{number}.{name}": array for name, array in constants.items()}
    place = folder / ENGINE_FOLDER
    place.mkdir()
    weights = Weights([graph.model for graph in graphs], source.checkpoint, computed)
    progress.stage(
        f"weights: {weights.bytes_referenced / 1e6:.0f} MB as they are, {weights.bytes_written / 1e6:.0f} MB written",
        weights.bytes_written,
    )
    weights.write(place, progress.advance)


def _copy_processor(source: Source, building: Path) -> None:
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


def _model_entry(source: Source) -> ModelEntry:
    spec = source.spec
    return ModelEntry(
        name=source.name,
        family=spec.family,
        config=spec.config,
        image_token_id=spec.image_token_id,
        eos_token_ids=list(spec.eos_token_ids),
        image_size=spec.vision.image_size,
        grid=spec.vision.grid,
        views=ViewsEntry(
            images=spec.views.images,
            views=spec.views.views,
            tiles=None if spec.views.tiles is None else list(spec.views.tiles),
            newlines=spec.views.newlines,
            asked={name: value for name, value in vars(spec.asked).items() if value is not None},
        ),
        vocabulary=spec.decoder.vocab_size,
        max_positions=spec.decoder.max_positions,
    )
