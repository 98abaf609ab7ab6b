"""ONNX graphs in the form that OpenVINO's reader gets: pruning ops inlined, caches out of the graph's inputs.

What holds the caches is decided when a bundle is opened (`vtexport.targets.openvino.reading`), so the inputs `past.*` and
the outputs `present.*` go.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from vtexport.graph.domains import NN

#: the domain of nodes that only `vtexport.targets.openvino.reading` knows
OWN = "vtexport.openvino"


def lower(model: ir.Model) -> None:
    """Inline what is not `vtexport.nn`, and take the caches out of every `CachedAttention`."""
    InlinePass(criteria=lambda function: function.domain != NN)(model)
    # Bodies would go before the conversions of `reading`.
    model.functions.clear()
    graph = model.graph
    for node in [node for node in graph if node.op_type == "TopK"]:
        _allow_none(graph, node)
    found = [node for node in graph if node.op_type == "CachedAttention"]
    if not found:
        return
    graph.outputs[:] = [value for value in graph.outputs if not str(value.name).startswith("present.")]
    for layer, node in enumerate(found):
        query, key, value, _, _, length = node.inputs
        assert query is not None, "attention has a query"
        assert query.shape is not None, "traced graphs have shapes"
        own = [
            ir.AttrInt64("layer", layer),
            # Layers of equal extent, which are those between two stages, share what they know of their caches.
            ir.AttrString("rows", str(query.shape[1])),
            ir.AttrInt64("ranks", int(bool(node.outputs[1].uses()))),
        ]
        new = ir.Node(
            OWN,
            "CachedAttention",
            [query, key, value, length],
            [*node.attributes.values(), *own],
            num_outputs=2,
        )
        for old, made in zip(node.outputs, new.outputs, strict=False):
            made.name, made.shape, made.type = old.name, old.shape, old.type
            ir.convenience.replace_all_uses_with(old, made)
        graph.insert_before(node, new)
        graph.remove(node, safe=True)
    graph.inputs[:] = [value for value in graph.inputs if not str(value.name).startswith("past.")]
    graph.opset_imports[OWN] = 1


def _allow_none(graph: ir.Graph, node: ir.Node) -> None:
    """Let TopK give none of several values, which OpenVINO's does not: a stage without tokens in one of the buckets.

    One value is asked for instead, if there is any, and cut off again.
    """
    values, number = node.inputs
    assert values is not None, "TopK has values"
    assert number is not None, "and a number of them"
    axis = node.attributes.get_int("axis")
    zero, one, axes = (ir.Value(name=f"{node.name}/{name}") for name in ("zero", "one", "axes"))
    for value, content in ((zero, 0), (one, 1), (axes, axis)):
        value.const_value = ir.tensor([content], dtype=ir.DataType.INT64)
    constants = [
        ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)], outputs=[value])  # type: ignore[arg-type]
        for value in (zero, one, axes)
    ]
    there = ir.Node("", "Shape", [values], [ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)])
    some = ir.Node("", "Max", [number, one])
    asked = ir.Node("", "Min", [some.outputs[0], there.outputs[0]])
    graph.insert_before(node, [*constants, there, some, asked])
    node.replace_input_with(1, asked.outputs[0])
    for old in node.outputs:
        uses = list(old.uses())
        cut = ir.Node("", "Slice", [old, zero, number, axes])
        graph.insert_after(node, cut)
        for user, place in uses:
            user.replace_input_with(place, cut.outputs[0])
