"""Traces a graph module on stand-ins for tensors into an ONNX model without weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from vtexport.errors import ModelError
from vtexport.graph.eager import DTYPES, of_dtype
from vtexport.graph.functions import attach_functions
from vtexport.graph.language import LanguageGraph
from vtexport.graph.select import SelectGraph
from vtexport.graph.tracing import Extent, Kind, Recorder
from vtexport.graph.vision import VisionGraph
from vtexport.models.spec import ModelSpec
from vtexport.pruning import PruningPlan
from vtexport.pruning.decoder import slots

_IR_VERSION = 10
_BATCH, _TEXT = Extent.named("batch"), Extent.named("text")


@dataclass(frozen=True)
class TracedGraph:
    """An ONNX model whose initialisers have names and shapes but no data yet."""

    name: str
    model: ir.Model


def trace_vision(spec: ModelSpec, plans: Sequence[PruningPlan], dtype: str, debug: bool) -> TracedGraph:
    """The vision graph; the batch is dynamic, the plans fix the visual counts."""
    v, views = spec.vision, spec.views.total
    view = (v.channels, v.image_size, v.image_size)
    inputs = {"pixel_values": Kind(torch.float32, (_BATCH, *view) if views == 1 else (_BATCH, views, *view))}
    for extra in plans[0].methods.vision.extras:
        inputs[extra.name] = Kind(getattr(torch, extra.dtype), (_BATCH, *extra.shape(spec, plans[0])))
    inputs |= dict.fromkeys(("sequence", "row_start"), Kind(torch.int64, (_BATCH, spec.num_visual_tokens)))
    with _skeleton(dtype):
        module = VisionGraph(spec, plans, debug)
    taken = {name: inputs[name] for name in module.input_names()}
    return _trace("vision", module, taken, module.output_names())


def trace_select(spec: ModelSpec, plan: PruningPlan, dtype: str) -> TracedGraph:
    """The graph that chooses visual tokens by a plan of `selection_plan`; extents as in the prefill graph."""
    inputs = _prompt_inputs(spec, plan, dtype, plan.vision_tokens)
    with _skeleton(dtype):
        module = SelectGraph(spec, plan)
    return _trace("select", module, {name: inputs[name] for name in module.input_names()}, module.output_names())


def _prompt_inputs(spec: ModelSpec, plan: PruningPlan, dtype: str, visual: int) -> dict[str, Kind]:
    """The inputs of a prompt with `visual` visual tokens, a number or an extent."""
    images = spec.views.images
    # NumPy has no bf16, so tensors that pass between bf16 graphs are fp32.
    visual_dtype = torch.float32 if dtype == "bf16" else DTYPES[dtype]
    inputs = {
        "input_ids": Kind(torch.int64, (_BATCH, _TEXT)),
        "image_position": Kind(torch.int64, (_BATCH,) if images == 1 else (_BATCH, images)),
        "text_length": Kind(torch.int64, (_BATCH,)),
        "visual": Kind(visual_dtype, (_BATCH, visual, spec.decoder.hidden_size)),
        "visual_length": Kind(torch.int64, (_BATCH, images)),
    }
    for extra in () if plan.methods.decoder is None else plan.methods.decoder.extras:
        shape = (visual if extent == plan.vision_tokens else extent for extent in extra.shape(spec, plan))
        inputs[extra.name] = Kind(getattr(torch, extra.dtype), (_BATCH, *shape))
    return inputs


def trace_language(
    spec: ModelSpec,
    plans: Sequence[PruningPlan],
    dtype: str,
    debug: bool = False,
    gives_ranking: bool = False,
    *,
    room: int | None,
) -> TracedGraph:
    """The language graph of all `plans`.

    Args:
        spec: the model.
        plans: the plans.
        dtype: "fp32", "fp16" or "bf16".
        debug: see `PrefillGraph`.
        gives_ranking: see `PrefillGraph`.
        room: text places of each layer's cache, besides the most visual tokens; None for caches of any capacity.
    """
    inputs = _prompt_inputs(spec, plans[0], dtype, Extent.named("visual"))
    inputs |= _cache_inputs(spec, plans, dtype, room)
    inputs |= {name: Kind(torch.int32, (Extent.named(name),)) for name in slots(plans, plans[0])}
    with _skeleton(dtype):
        module = LanguageGraph(spec, plans, debug, gives_ranking)
    return _trace("language", module, {name: inputs[name] for name in module.input_names()}, module.output_names())


def _cache_inputs(spec: ModelSpec, plans: Sequence[PruningPlan], dtype: str, room: int | None) -> dict[str, Kind]:
    """What rows hold already: lengths, positions, and each layer's cache; see `trace_language` for `room`."""
    d = spec.decoder
    inputs = dict.fromkeys(("length", "position"), Kind(torch.int64, (d.num_layers, _BATCH)))
    most = map(max, zip(*(plan.per_layer for plan in plans), strict=True))
    for layer, visual in enumerate(most):
        capacity = Extent.named(f"capacity_{layer}") if room is None else min(visual + room, d.max_positions)
        cache = Kind(DTYPES[dtype], (_BATCH, d.num_kv_heads, capacity, d.head_size))
        inputs |= {f"past.{layer}.{part}": cache for part in ("key", "value")}
    return inputs


def _trace(name: str, module: torch.nn.Module, inputs: Mapping[str, Kind], output_names: Sequence[str]) -> TracedGraph:
    recorder = Recorder(name, module)
    given = [recorder.input(input_name, kind) for input_name, kind in inputs.items()]
    try:
        with recorder:
            outputs = module(*given)
    except NotImplementedError as error:
        raise ModelError(
            f"the {name} graph of this model cannot be traced ({error}); please report this model"
        ) from error
    for output_name, tensor in zip(output_names, outputs, strict=True):
        recorder.output(output_name, tensor)
    model = ir.Model(recorder.graph, ir_version=_IR_VERSION, producer_name="vtexport")
    attach_functions(model)
    return TracedGraph(name, model)


@contextlib.contextmanager
def _skeleton(dtype: str) -> Iterator[None]:
    """Modules made inside have shapes and `dtype` but no storage."""
    with of_dtype(DTYPES[dtype]), torch.device("meta"):
        yield
