"""A bundle's graphs, as compiled for ONNX Runtime, behind the inputs and outputs that transformers.js knows.

It embeds the prompt's tokens, puts the vision encoder's rows where image tokens stand, and gives the decoder those rows,
the caches, and nothing that says where the image is. A decoder that prunes must know: all rows then have one channel
more, the mark, which is 1 in rows of the image and 0 in those of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vtexport.graph.domains import OPSET
from vtexport.graph.graphs import cache_names
from vtexport.pruning import PruningPlan
from vtexport.pruning.decoder import slots

_IR_VERSION = 10
_FLOAT = ir.TensorType(ir.DataType.FLOAT)
_INT64 = ir.TensorType(ir.DataType.INT64)


def marked(plan: PruningPlan) -> bool:
    """Whether rows have a mark."""
    return bool(plan.decoder_stages)


def vision_encoder(model: ir.Model, plan: PruningPlan) -> None:
    """The vision graph: pixel_values [n, 3, S, S] fp32 -> image_features [n, K, C] fp32, C + 1 where rows are marked."""
    tape, graph = _Tape(), model.graph
    visual = next(value for value in graph.outputs if value.name == "visual")
    features = tape.op("Cast", visual, to=int(ir.DataType.FLOAT))
    if marked(plan):
        features = tape.marked(features, 1.0)
    graph.extend(tape.nodes)
    channels = _extent(visual, 2) + marked(plan)
    _output(graph, "image_features", features, ["images", plan.vision_tokens, channels])
    RemoveUnusedNodesPass()(model)


def embed_tokens(language: ir.Model, plan: PruningPlan) -> ir.Model:
    """input_ids [B, S] int64 -> inputs_embeds [B, S, C] fp32, C + 1 where rows are marked.

    The id of image tokens, whose rows are replaced, may lie outside the vocabulary.
    """
    table = _embedding(language.graph).inputs[0]
    assert table is not None, "an embedding has a table"
    assert table.const_value is not None, "which is a weight"
    weight = ir.Value(name=table.name, shape=table.shape, type=table.type, const_value=table.const_value)
    vocabulary, width = _extent(table, 0), _extent(table, 1)
    ids = ir.Value(name="input_ids", shape=ir.Shape(["batch_size", "sequence_length"]), type=_INT64)
    tape = _Tape()
    known = tape.op("Min", ids, tape.constant([vocabulary - 1]))
    rows = tape.op("Cast", tape.op("Gather", weight, known), to=int(ir.DataType.FLOAT))
    if marked(plan):
        rows = tape.marked(rows, 0.0)
    graph = ir.Graph([ids], [], nodes=tape.nodes, initializers=[weight], opset_imports={"": OPSET}, name="embed_tokens")
    _output(graph, "inputs_embeds", rows, ["batch_size", "sequence_length", width + marked(plan)])
    return ir.Model(graph, ir_version=_IR_VERSION, producer_name="vtexport")


def decoder(model: ir.Model, plan: PruningPlan) -> None:
    """The language graph for one prompt: its rows, or those of one more token, behind what each layer's cache holds.

    Inputs: inputs_embeds [1, S, C] fp32, C + 1 where rows are marked; per layer past_key_values.i.key and .value
    [1, G, P_i, D]. Outputs: logits [1, 1, vocabulary] fp32 of the last row; present.i.key and .value [1, G, P_i + S_i, D].
    """
    tape, graph = _Tape(), model.graph
    given = {str(value.name): value for value in graph.inputs}
    made = _rows(tape, graph, plan) | _before(tape, given, plan)
    for name, value in made.items():
        if name in given:
            given[name].replace_all_uses_with(value)
    logits = next(value for value in graph.outputs if value.name == "logits")
    logits.name = "last_logits"
    present = {str(value.name): value for value in graph.outputs if str(value.name).startswith("present.")}
    caches = cache_names("past", plan.num_layers)
    graph.inputs[:] = [made["inputs_embeds"], *(_cache(given[name]) for name in caches)]
    first = next(iter(graph))
    graph.insert_before(first, tape.nodes)
    end = _Tape()
    steps = end.op("Unsqueeze", logits, end.constant([1]))
    graph.extend(end.nodes)
    names = cache_names("present", plan.num_layers)
    for name in names:
        present[name].shape = _cache_shape(present[name], name)
    _output(graph, "logits", steps, [1, 1, _extent(logits, 1)])
    graph.outputs.extend(present[name] for name in names)
    RemoveUnusedNodesPass()(model)


@dataclass(frozen=True)
class _Parts:
    """The rows given to the decoder, taken apart: text [1, L, C], visual [1, V, C], place of the image [1], V [1]."""

    text: ir.Value
    visual: ir.Value
    place: ir.Value
    count: ir.Value


def _rows(tape: _Tape, graph: ir.Graph, plan: PruningPlan) -> dict[str, ir.Value]:
    """What the language graph's inputs for new rows are made of, by their names, and inputs_embeds itself."""
    gather = _embedding(graph)
    table, embedded = gather.inputs[0], gather.outputs[0]
    assert table is not None, "an embedding has a table"
    assert table.dtype is not None, "which has a dtype"
    width, dtype = _extent(table, 1), int(table.dtype)
    channels = width + marked(plan)
    embeds = ir.Value(name="inputs_embeds", shape=ir.Shape([1, "sequence_length", channels]), type=_FLOAT)
    parts = _parted(tape, embeds, width) if marked(plan) else _all_text(tape, embeds)
    text = tape.op("Cast", parts.text, to=dtype)
    embedded.replace_all_uses_with(text)
    length = tape.extent(parts.text, 1)
    made = {
        "inputs_embeds": embeds,
        "input_ids": tape.op(
            "ConstantOfShape", tape.op("Concat", tape.constant([1]), length, axis=0), value=_zero(1, np.int64)
        ),
        "text_length": length,
        "image_position": parts.place,
        "visual": tape.op("Cast", parts.visual, to=dtype),
    }
    # A stage has its tokens where there is an image, and none where there is only text.
    there = tape.op("Min", parts.count, tape.constant([1]))
    for name, number in slots([plan], plan).items():
        extent = tape.op("Mul", there, tape.constant([number]))
        made[name] = tape.op("ConstantOfShape", extent, value=_zero(1, np.int32))
    return made


def _parted(tape: _Tape, embeds: ir.Value, width: int) -> _Parts:
    """Marked rows, taken apart."""
    zero, end, axis = tape.constant([0]), tape.constant([np.iinfo(np.int64).max]), tape.constant([1])
    channels, split = tape.constant([2]), tape.constant([width])
    rows = tape.op("Slice", embeds, zero, split, channels)
    mark = tape.op("Squeeze", tape.op("Slice", embeds, split, end, channels), channels)
    place = tape.op("ArgMax", mark, axis=1, keepdims=0)
    count = tape.op("Cast", tape.op("ReduceSum", mark, axis, keepdims=0), to=int(ir.DataType.INT64))
    behind = tape.op("Add", place, count)
    before, after = tape.op("Slice", rows, zero, place, axis), tape.op("Slice", rows, behind, end, axis)
    text = tape.op("Concat", before, after, axis=1)
    return _Parts(text, tape.op("Slice", rows, place, behind, axis), place, count)


def _all_text(tape: _Tape, embeds: ir.Value) -> _Parts:
    """Rows of which none is pruned, so that it does not matter which ones are visual."""
    zero = tape.constant([0])
    return _Parts(embeds, tape.op("Slice", embeds, zero, zero, tape.constant([1])), zero, zero)


def _before(tape: _Tape, given: dict[str, ir.Value], plan: PruningPlan) -> dict[str, ir.Value]:
    """How many tokens each layer's cache holds, and where the new ones stand, [N, 1] int64 both."""
    lengths = [tape.extent(given[f"past.{layer}.key"], 2) for layer in range(plan.num_layers)]
    shape = tape.constant([-1, 1])
    length = tape.op("Reshape", tape.op("Concat", *lengths, axis=0), shape)
    if plan.positions == "compact":
        return {"length": length, "position": length}
    # The first layer, behind which the first stage stands, has seen every token.
    everywhere = tape.op("Expand", lengths[0], tape.constant([plan.num_layers, 1]))
    return {"length": length, "position": everywhere}


class _Tape:
    """Nodes in the order in which they were made."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The output of a new node."""
        values = ir.convenience.convert_attributes(attributes)
        self.nodes.append(ir.Node("", op_type, inputs, values))
        return self.nodes[-1].outputs[0]

    def constant(self, numbers: Sequence[int]) -> ir.Value:
        """A constant, [n] int64."""
        return self.op("Constant", value=ir.tensor(np.array(numbers, dtype=np.int64)))

    def extent(self, value: ir.Value, axis: int) -> ir.Value:
        """An extent of `value`, [1] int64."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def marked(self, rows: ir.Value, mark: float) -> ir.Value:
        """`rows` [B, S, C] with `mark` as one channel more."""
        value = self.op("Constant", value=ir.tensor(np.array(mark, dtype=np.float32)))
        return self.op("Pad", rows, self.constant([0, 0, 0, 0, 0, 1]), value)


def _zero(length: int, dtype: type[np.generic]) -> ir.TensorProtocol:
    return ir.tensor(np.zeros(length, dtype=dtype))


def _embedding(graph: ir.Graph) -> ir.Node:
    """The node that embeds the prompt's tokens."""
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    return next(use.node for use in ids.uses() if use.node.op_type == "Gather")


def _cache(value: ir.Value) -> ir.Value:
    """A cache as an input under the name that transformers.js has for it."""
    value.shape = _cache_shape(value, str(value.name))
    value.name = str(value.name).replace("past.", "past_key_values.", 1)
    return value


def _cache_shape(value: ir.Value, name: str) -> ir.Shape:
    """[1, G, any, D]: layers differ in their number of tokens, and transformers.js begins with none where none is said."""
    assert value.shape is not None, "caches have shapes"
    _, heads, _, size = value.shape
    kind, layer, _ = name.split(".")
    return ir.Shape([1, heads, f"{kind}_length_{layer}", size])


def _extent(value: ir.Value, axis: int) -> int:
    """An extent of `value` that is known."""
    assert value.shape is not None, "compiled graphs have shapes"
    extent = value.shape[axis]
    assert isinstance(extent, int), "only rows and batch are dynamic"
    return extent


def _output(graph: ir.Graph, name: str, value: ir.Value, shape: Sequence[int | str]) -> None:
    """Let `graph` give nothing but `value`, fp32 of `shape`, as `name`."""
    value.name, value.shape, value.type = name, ir.Shape(shape), _FLOAT
    graph.outputs[:] = [value]
