"""Attention in the forms that TensorRT fuses into one kernel.

`lower_attention` puts them in place of the function bodies of the same names in `vtexport.graph.nn_functions`. What was
found with TensorRT for RTX 1.7.1, in fp16, by the kernels in the plans that it builds:

- Causal attention with five axes [B, G, H / G, S, D] is fused where H = G only. With four axes, the keys and values
  repeated for every query head, it is fused at 32/32, 32/8, 28/4 and 8/2 heads alike.
- Attention of one query row to a cache crashes the builder where H = G > 1. With that row twice it is built and fused.
  Where H > G there are several rows per key head already.
"""

# The bodies are onnxscript: Python syntax that is never run as Python.
# mypy: ignore-errors

from typing import TypeVar, Union

import onnx_ir as ir
from onnxscript import FLOAT, FLOAT16, INT64, script
from onnxscript import opset18 as op

from vtexport.graph.nn_functions import nn

T = TypeVar("T", bound=Union[FLOAT, FLOAT16])  # noqa: UP007 - onnxscript reads typing.Union only


@script(nn, default_opset=op)
def CausalAttention(query: T, key: T, value: T, num_heads: int, kv_heads: int, scale: float) -> tuple[T, T, T]:
    groups = op.Reshape(op.Constant(value_int=kv_heads), op.Constant(value_ints=[1]))
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    zeros = op.Constant(value_ints=[0, 0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    cache_shape = op.Concat(zeros, groups, rest, axis=0)
    present_key = op.Transpose(op.Reshape(key, cache_shape), perm=[0, 2, 1, 3])
    present_value = op.Transpose(op.Reshape(value, cache_shape), perm=[0, 2, 1, 3])
    scaled = query * op.CastLike(op.Constant(value_float=scale), query)
    q = op.Transpose(op.Reshape(scaled, op.Concat(zeros, heads, rest, axis=0)), perm=[0, 2, 1, 3])
    axis = op.Constant(value_ints=[2])
    width = op.Shape(present_key, start=3, end=4)
    repeats = op.Concat(one, one, heads / groups, one, one, axis=0)
    by_head = op.Concat(op.Constant(value_ints=[0]), heads, rest, width, axis=0)
    k = op.Reshape(op.Expand(op.Unsqueeze(present_key, axis), repeats), by_head)
    v = op.Reshape(op.Expand(op.Unsqueeze(present_value, axis), repeats), by_head)
    logits = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))
    rows = op.Squeeze(op.Shape(query, start=1, end=2))
    place = op.Range(op.Constant(value_int=0), rows, op.Constant(value_int=1))
    seen = op.LessOrEqual(op.Unsqueeze(place, op.Constant(value_ints=[0])), op.Unsqueeze(place, one))
    masked = op.Where(seen, logits, op.CastLike(op.Constant(value_float=float("-inf")), logits))
    mixed = op.MatMul(op.Softmax(masked, axis=-1), v)
    output = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return output, present_key, present_value


@script(nn, default_opset=op)
def CachedAttention(
    query: T,
    key: T,
    value: T,
    past_key: T,
    past_value: T,
    length: INT64,
    num_heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[T, T, T]:
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    new_shape = op.Concat(zero, heads, one, op.Constant(value_ints=[-1]), axis=0)
    room = op.Squeeze(op.Shape(past_key, start=2, end=3))
    place = op.Range(op.Constant(value_int=0), room, op.Constant(value_int=1))
    rows = op.Unsqueeze(length, one)
    slot = op.Unsqueeze(op.Equal(place, rows), op.Constant(value_ints=[1, 3]))
    present_key = op.Where(slot, op.Reshape(key, new_shape), past_key)
    present_value = op.Where(slot, op.Reshape(value, new_shape), past_value)
    row = op.Reshape(query * op.CastLike(op.Constant(value_float=scale), query), new_shape)
    logits = op.MatMul(op.Concat(row, row, axis=2), op.Transpose(present_key, perm=[0, 1, 3, 2]))
    seen = op.Unsqueeze(op.LessOrEqual(place, rows), op.Constant(value_ints=[1, 2]))
    masked = op.Where(seen, logits, op.CastLike(op.Constant(value_float=float("-inf")), logits))
    mixed = op.Slice(op.MatMul(op.Softmax(masked, axis=-1), present_value), zero, one, two)
    return op.Reshape(mixed, op.Constant(value_ints=[0, 1, -1])), present_key, present_value


def lower_attention(model: ir.Model) -> None:
    """Replace the bodies of the decoder's attention in `model` by those above, where TensorRT needs it."""
    nodes = {node.op_type: node for node in model.graph if node.domain == nn.domain}
    causal, cached = nodes.get("CausalAttention"), nodes.get("CachedAttention")
    replaced = []
    if causal is not None:
        replaced.append(CausalAttention)
    if cached is not None and cached.attributes.get_int("num_heads") == cached.attributes.get_int("kv_heads"):
        replaced.append(CachedAttention)
    for function in replaced:
        body = ir.serde.deserialize_function(function.to_function_proto())
        # Quantisation may have raised the opset of the model and of its functions.
        body.opset_imports.update(model.functions[body.identifier()].opset_imports)
        model.functions[body.identifier()] = body
