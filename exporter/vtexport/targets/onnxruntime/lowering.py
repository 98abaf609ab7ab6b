"""ONNX Runtime's own kernels in place of the `vtexport.nn` functions.

Rewrites, one node by one node:
    FullAttention    -> com.microsoft.MultiHeadAttention
    CausalAttention  -> com.microsoft.GroupQueryAttention without a past
    CachedAttention  -> com.microsoft.GroupQueryAttention, which writes new tokens into the cache in place
    Rotary           -> com.microsoft.RotaryEmbedding
and a product with a transposed weight
    Transpose MatMul -> com.microsoft.FusedMatMul, which takes the weight as the file has it: transposed when a graph is
                        loaded, all weights would be in memory twice.
The `vtexport` functions stay as they are: their bodies run on the standard kernels. So do cached and causal attention
with a head size that is not a multiple of 8, which GroupQueryAttention does not take, and RMSNorm, whose body ONNX
Runtime itself fuses into a kernel that a valid ONNX file cannot name.
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
            _take_place(graph, node, _lowered(node, lengths))
        fused = _fuse_transposes(graph)
        called = {node.op_identifier() for node in graph}
        for identifier in [key for key in model.functions if key not in called]:
            del model.functions[identifier]
        if not any(domain == NN for domain, _, _ in called):
            graph.opset_imports.pop(NN, None)
        if replaced or fused:
            graph.opset_imports[_MS] = 1
        return passes.PassResult(model, bool(replaced) or fused)


def _fuse_transposes(graph: ir.Graph) -> bool:
    """Let products read the weights that they transpose; whether there were any."""
    found = False
    for node in [node for node in graph if node.op_type == "MatMul" and not node.domain]:
        x, right = node.inputs
        transpose = None if right is None else right.producer()
        weight = None if transpose is None or transpose.op_type != "Transpose" else transpose.inputs[0]
        if weight is None or not weight.is_initializer() or transpose is None:
            continue
        new = ir.Node(_MS, "FusedMatMul", [x, weight], [ir.AttrInt64("transB", 1)])
        _take_place(graph, node, new)
        if not transpose.outputs[0].uses():
            graph.remove(transpose, safe=True)
        found = True
    return found


def _take_place(graph: ir.Graph, node: ir.Node, new: ir.Node) -> None:
    for old_value, new_value in zip(node.outputs, new.outputs, strict=True):
        new_value.name, new_value.shape, new_value.type = old_value.name, old_value.shape, old_value.type
        # A graph output is named and ordered by the caller: it must keep its place.
        ir.convenience.replace_all_uses_with(old_value, new_value, replace_graph_outputs=True)
    graph.insert_before(node, new)
    graph.remove(node, safe=True)


def _has_kernel(node: ir.Node) -> bool:
    if node.op_type not in ("CausalAttention", "CachedAttention"):
        return node.op_type != "RMSNorm"
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    assert shape is not None, "traced graphs have shapes"
    width = shape[2]
    assert isinstance(width, int), "only rows and batch are dynamic"
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
    # A padded row needs no length of its own: causal attention never reaches the padding on the right.
    cache = node.inputs[3:5] if node.op_type == "CachedAttention" else (None, None)
    inputs = [*node.inputs[:3], *cache, *lengths.of(node)]
    return ir.Node(_MS, "GroupQueryAttention", inputs, values, num_outputs=3)


class _Lengths:
    """GroupQueryAttention's seqlens_k [B] (tokens before the last one) and total length, int32.

    Made once for all layers with the same rows, and with a cache for each layer's own lengths.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._rows: dict[str, ir.Value] = {}
        self._made: dict[tuple[str, ir.Value | None], tuple[ir.Value, ir.Value]] = {}

    def of(self, node: ir.Node) -> tuple[ir.Value, ir.Value]:
        query = node.inputs[0]
        length = node.inputs[5] if node.op_type == "CachedAttention" else None
        assert query is not None, "attention has a query"
        assert query.shape is not None, "traced graphs have shapes"
        key = str(query.shape[1]), length
        if key not in self._made:
            rows = self._rows.get(key[0])
            if rows is None:
                rows = self._rows[key[0]] = self._add(node, "Shape", [query], start=1, end=2)
            if length is None:
                batch = self._add(node, "Shape", [query], start=0, end=1)
                before, total = self._add(node, "Expand", [rows, batch]), rows
            else:
                before = self._add(node, "Add", [length, rows])
                total = self._add(node, "ReduceMax", [before], keepdims=0)
            behind = self._add(node, "Sub", [before, self._constant(node, [1])])
            self._made[key] = self._cast(node, behind), self._cast(node, self._scalar(node, total))
        return self._made[key]

    def _scalar(self, before: ir.Node, value: ir.Value) -> ir.Value:
        return self._add(before, "Reshape", [value, self._constant(before, [])])

    def _add(self, before: ir.Node, op_type: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
        values = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        new = ir.Node("", op_type, inputs, values)
        self._graph.insert_before(before, new)
        return new.outputs[0]

    def _cast(self, before: ir.Node, value: ir.Value) -> ir.Value:
        return self._add(before, "Cast", [value], to=int(ir.DataType.INT32))

    def _constant(self, before: ir.Node, value: list[int]) -> ir.Value:
        tensor = ir.tensor(value, dtype=ir.DataType.INT64)
        new = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
        self._graph.insert_before(before, new)
        return new.outputs[0]
