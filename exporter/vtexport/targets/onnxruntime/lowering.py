"""ONNX Runtime's own kernels in place of the `vtexport.nn` functions.

Rewrites, one node by one node:
    FullAttention    -> com.microsoft.MultiHeadAttention
    CausalAttention  -> com.microsoft.GroupQueryAttention without a past
    CachedAttention  -> com.microsoft.GroupQueryAttention, which writes the new token into the cache in place
    Rotary           -> com.microsoft.RotaryEmbedding
The `vtexport` functions stay as they are: their bodies run on the standard kernels. So do cached and causal
attention with a head size that is not a multiple of 8, or of several new tokens behind a cache, which
GroupQueryAttention does not take, and RMSNorm, whose body
ONNX Runtime itself fuses into a kernel that a valid ONNX file cannot name.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import passes

from vtexport.graph.domains import NN

_MS = "com.microsoft"


class LowerToContrib(passes.InPlacePass):
    """Replace the `vtexport.nn` nodes of the main graph, and drop the functions that no node calls any more."""

    def call(self, model: ir.Model) -> passes.PassResult:
        graph = model.graph
        lengths = _Lengths(graph)
        replaced = [node for node in graph if node.domain == NN and _has_kernel(node)]
        for node in replaced:
            new = _lowered(node, lengths)
            for old_value, new_value in zip(node.outputs, new.outputs, strict=True):
                new_value.name, new_value.shape, new_value.type = old_value.name, old_value.shape, old_value.type
                # A graph output is named and ordered by the caller: it must keep its place.
                ir.convenience.replace_all_uses_with(old_value, new_value, replace_graph_outputs=True)
            graph.insert_before(node, new)
            graph.remove(node)
        called = {node.op_identifier() for node in graph}
        for identifier in [key for key in model.functions if key not in called]:
            del model.functions[identifier]
        if not any(domain == NN for domain, _, _ in called):
            graph.opset_imports.pop(NN, None)
        if replaced:
            graph.opset_imports[_MS] = 1
        return passes.PassResult(model, bool(replaced))


def _has_kernel(node: ir.Node) -> bool:
    if node.op_type not in ("CausalAttention", "CachedAttention"):
        return node.op_type != "RMSNorm"
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    assert shape is not None, "traced graphs have shapes"
    rows, width = shape[1], shape[2]
    assert isinstance(width, int), "only batch and text length are dynamic"
    if node.op_type == "CachedAttention" and rows != 1:
        return False
    return width // node.attributes.get_int("num_heads") % 8 == 0


def _lowered(node: ir.Node, lengths: _Lengths) -> ir.Node:
    attributes = node.attributes
    if node.op_type == "Rotary":
        heads = ir.AttrInt64("num_heads", attributes.get_int("num_heads"))
        return ir.Node(_MS, "RotaryEmbedding", node.inputs, [heads, ir.AttrInt64("interleaved", 0)])
    heads = ir.AttrInt64("num_heads", attributes.get_int("num_heads"))
    scale = ir.AttrFloat32("scale", attributes.get_float("scale"))
    if node.op_type == "FullAttention":
        return ir.Node(_MS, "MultiHeadAttention", node.inputs, [heads, scale])
    values: list[ir.Attr] = [heads, scale, ir.AttrInt64("kv_num_heads", attributes.get_int("kv_heads"))]
    if node.op_type == "CausalAttention":
        # A padded row needs no length of its own: causal attention never reaches the padding on the right.
        inputs = [*node.inputs, None, None, *lengths.of_prompt(node)]
    else:
        inputs = [*node.inputs[:5], *lengths.of_cache(node)]
    return ir.Node(_MS, "GroupQueryAttention", inputs, values, num_outputs=3)


class _Lengths:
    """GroupQueryAttention's seqlens_k [B] (tokens before the last one) and total length, int32.

    Made once for all layers with the same number of rows (prefill), and for each layer's own lengths (decode).
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[object, tuple[ir.Value, ir.Value]] = {}

    def of_prompt(self, node: ir.Node) -> tuple[ir.Value, ir.Value]:
        query = node.inputs[0]
        assert query is not None, "CausalAttention has a query"
        assert query.shape is not None, "traced graphs have shapes"
        rows_of = str(query.shape[1])
        if rows_of not in self._made:
            rows = self._add(node, "Shape", [query], start=1, end=2)
            batch = self._add(node, "Shape", [query], start=0, end=1)
            total = self._cast(node, self._add(node, "Squeeze", [rows]))
            before = self._cast(node, self._add(node, "Sub", [rows, self._constant(node, [1])]))
            self._made[rows_of] = self._add(node, "Expand", [before, batch]), total
        return self._made[rows_of]

    def of_cache(self, node: ir.Node) -> tuple[ir.Value, ir.Value]:
        length = node.inputs[5]
        assert length is not None, "CachedAttention has six inputs"
        if length not in self._made:
            longest = self._add(node, "ReduceMax", [length], keepdims=0)
            total = self._add(node, "Add", [longest, self._constant(node, 1)])
            self._made[length] = self._cast(node, length), self._cast(node, total)
        return self._made[length]

    def _add(self, before: ir.Node, op_type: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
        values = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        new = ir.Node("", op_type, inputs, values)
        self._graph.insert_before(before, new)
        return new.outputs[0]

    def _cast(self, before: ir.Node, value: ir.Value) -> ir.Value:
        return self._add(before, "Cast", [value], to=int(ir.DataType.INT32))

    def _constant(self, before: ir.Node, value: int | list[int]) -> ir.Value:
        new = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(value, dtype=ir.DataType.INT64))])
        self._graph.insert_before(before, new)
        return new.outputs[0]
