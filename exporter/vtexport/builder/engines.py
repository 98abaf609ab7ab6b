"""Compiles the graphs of a checkpoint and its plans into a folder, for the build and for its self-check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vtexport.bundle.manifest import GraphEntry, PortEntry
from vtexport.figures import size
from vtexport.models import Checkpoint, ModelSpec
from vtexport.progress import Progress
from vtexport.pruning import PruningPlan
from vtexport.pruning.adaptive import Policy
from vtexport.targets.base import ENGINE_FOLDER, Compiled, CompileJob, Target

if TYPE_CHECKING:
    from vtexport.graph.export import TracedGraph
    from vtexport.graph.weights import Lazy


@dataclass(frozen=True)
class Source:
    """What a bundle is made from: a model's name, folder, processor, weights and geometry, and a CLIP's folder."""

    name: str
    folder: Path
    processor: Path
    checkpoint: Checkpoint
    spec: ModelSpec
    clip: Path | None = None


@dataclass(frozen=True)
class EngineSpec:
    """How to make graphs from a source: plans (if several, `policy` chooses one per image), dtype, extra outputs."""

    plans: Sequence[PruningPlan]
    dtype: str
    policy: Policy | None = None
    debug: bool = False
    give_ranking: bool = False


@dataclass(frozen=True)
class Made:
    """The result of `make_engines`: the compiled files, and the inputs and outputs of each graph."""

    compiled: Compiled
    ports: Mapping[str, GraphEntry]


def make_engines(source: Source, engines: EngineSpec, target: Target, folder: Path, progress: Progress) -> Made:
    """Trace, write weights and compile into `folder / ENGINE_FOLDER`; files that only compiling needs stay there."""
    graphs = _trace(source.spec, engines, target, progress)
    ports = {graph.name: _ports(graph) for graph in graphs}
    scheme = target.scheme()
    encoded: Mapping[str, Lazy] = {}
    if scheme is not None:
        from vtexport.targets.quantize import quantize

        encoded = quantize([graph.model for graph in graphs], scheme)
    _write_weights(graphs, folder, source, engines.plans, encoded, progress)
    compiled = target.compile(
        CompileJob(
            folder=folder,
            models={graph.name: graph.model for graph in graphs},
            spec=source.spec,
            plans=engines.plans,
            dtype=engines.dtype,
            processor=source.processor,
            report=progress.stage,
            advance=progress.advance,
            warn=progress.warn,
        )
    )
    return Made(compiled, ports)


def _trace(spec: ModelSpec, engines: EngineSpec, target: Target, progress: Progress) -> list[TracedGraph]:
    from vtexport.graph.export import trace_language, trace_select, trace_vision

    plans, dtype, outputs = engines.plans, engines.dtype, (engines.debug, engines.give_ranking)
    parts = [partial(trace_vision, spec, plans, dtype, engines.debug)]
    if target.selects:
        parts.append(partial(trace_select, spec, plans[0], dtype))
    elif not target.vision_only:
        parts.append(partial(trace_language, spec, plans, dtype, *outputs, room=target.cache_room))
    progress.stage("trace the graphs", len(parts))
    graphs = []
    for part in parts:
        graphs.append(part())
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
        constants = plan.methods.vision.constants(plan, source.spec.vision.grid)
        computed |= {f"pruning.{number}.{name}": array for name, array in constants.items()}
    place = folder / ENGINE_FOLDER
    place.mkdir()
    weights = Weights([graph.model for graph in graphs], source.checkpoint, computed)
    progress.stage(
        f"weights: {size(weights.bytes_referenced)} as they are, {size(weights.bytes_written)} written",
        weights.bytes_read + weights.bytes_written,
    )
    # Before anything is compiled: the self-check would only find that the answers are no numbers, not why.
    weights.check(progress.advance)
    weights.write(place, progress.advance)


def _ports(graph: TracedGraph) -> GraphEntry:
    def entry(value: object) -> PortEntry:
        shape = [extent if isinstance(extent, int) else str(extent.value) for extent in value.shape]  # type: ignore[attr-defined]
        return PortEntry(value.name, str(value.dtype.name).lower(), shape)  # type: ignore[attr-defined]

    model = graph.model.graph
    return GraphEntry([entry(v) for v in model.inputs], [entry(v) for v in model.outputs])
