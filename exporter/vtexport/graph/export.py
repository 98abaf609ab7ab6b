"""Tracing: a graph module on fake tensors -> an ONNX model without weights."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from vtexport.graph.functions import OPSET, attach_functions
from vtexport.graph.graphs import DecodeGraph, PrefillGraph, VisionGraph, cache_names
from vtexport.models.spec import ModelSpec
from vtexport.pruning import PruningPlan

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TracedGraph:
    """An ONNX model whose initialisers have names and shapes but no data yet."""

    name: str
    model: ir.Model


def trace_vision(spec: ModelSpec, plans: Sequence[PruningPlan], dtype: str, debug: bool) -> TracedGraph:
    """The vision graph; batch is dynamic, the visual counts are the plans'."""
    with _fake(dtype):
        module = VisionGraph(spec, plans, debug)
        kinds = {"pixel_values": torch.float32}
        inputs = tuple(
            torch.zeros(2, *extents, dtype=kinds.get(name, torch.int64))
            for name, extents in vision_extents(spec).items()
            if name in module.input_names()
        )
        batch = Dim("batch")
        dynamic = _starred(({0: batch},), tuple({0: batch} for _ in inputs[1:]))
        return _trace("vision", module, inputs, module.input_names(), module.output_names(), dynamic)


def vision_extents(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The extents of the vision graph's possible inputs, the batch left out; in their order."""
    v, views = spec.vision, spec.views.total
    view = (v.channels, v.image_size, v.image_size)
    found: dict[str, tuple[int, ...]] = {"pixel_values": view if views == 1 else (views, *view)}
    if spec.clip is not None:
        found["question_ids"] = (spec.clip.length,)
    return {**found, "sequence": (spec.num_visual_tokens,), "row_start": (spec.num_visual_tokens,)}


def trace_prefill(
    spec: ModelSpec, plan: PruningPlan, dtype: str, debug: bool = False, ranks: bool = False, name: str = "prefill"
) -> TracedGraph:
    """The prefill graph `name`; batch and text length are dynamic, the visual counts are the plan's."""
    with _fake(dtype):
        module = PrefillGraph(spec, plan, debug, ranks)
        # NumPy has no bf16: what passes between graphs is fp32 then.
        own = torch.float32 if dtype == "bf16" else DTYPES[dtype]
        visual = torch.empty(2, plan.vision_tokens, spec.decoder.hidden_size, dtype=own)
        images = spec.views.images
        at = (2,) if images == 1 else (2, images)
        ids, position, length = (torch.zeros(shape, dtype=torch.int64) for shape in ((2, 7), at, (2,)))
        batch, text = Dim("batch"), Dim("text")
        others: tuple[torch.Tensor, ...] = ()
        if "ranking" in module.input_names():
            (stage,) = plan.decoder_stages.values()
            others += (torch.empty(2, stage.tokens_in, dtype=torch.float32),)
        if "visual_length" in module.input_names():
            others += (torch.zeros(2, images, dtype=torch.int64),)
        named: tuple[Any, ...] = ({0: batch, 1: text}, *({0: batch},) * 3)
        dynamic = _starred(named, tuple({0: batch} for _ in others))
        inputs = (ids, position, length, visual, *others)
        return _trace(name, module, inputs, module.input_names(), module.output_names(), dynamic)


def trace_decode(spec: ModelSpec, dtype: str, ranks: int = 0) -> TracedGraph:
    """The decode graph; batch and every layer's cache capacity are dynamic; see `DecodeGraph` for `ranks`."""
    with _fake(dtype):
        d = spec.decoder
        module = DecodeGraph(spec, ranks)
        past = [torch.empty(2, d.num_kv_heads, 9, d.head_size) for _ in range(2 * d.num_layers)]
        length, position = (torch.zeros(d.num_layers, 2, dtype=torch.int64) for _ in range(2))
        batch = Dim("batch")
        rooms = [Dim(f"capacity_{layer}") for layer in range(d.num_layers) for _ in ("key", "value")]
        inputs: tuple[Any, ...] = (torch.zeros(2, 1, dtype=torch.int64), length, position, past)
        names = ["input_ids", "length", "position", *cache_names("past", d.num_layers)]
        outputs = ["logits", *cache_names("present", d.num_layers)]
        dynamic: tuple[Any, ...] = ({0: batch}, {1: batch}, {1: batch}, [{0: batch, 2: room} for room in rooms])
        if ranks:
            inputs += (torch.zeros(2, dtype=torch.int64),)
            names, outputs, dynamic = [*names, "image_position"], [*outputs, "ranking"], (*dynamic, {0: batch})
        return _trace("decode", module, inputs, names, outputs, dynamic)


def _starred(named: tuple[Any, ...], others: tuple[Any, ...]) -> tuple[Any, ...]:
    """Dynamic shapes of named arguments and of those that come starred, which are one to torch.export."""
    return (*named, others) if others else named


def _trace(
    name: str,
    module: torch.nn.Module,
    inputs: tuple[Any, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: tuple[Any, ...],
) -> TracedGraph:
    # The exporter prints and warns for its own developers; what concerns a user, verification finds.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=dynamic_shapes,
        )
    assert program is not None
    attach_functions(program.model)
    return TracedGraph(name, program.model)


@contextlib.contextmanager
def _fake(dtype: str) -> Iterator[None]:
    """Modules and tensors made inside have shapes and `dtype` but no storage."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
