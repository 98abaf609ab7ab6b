"""Attention to a cache in the form that TensorRT has layers for: the cache updated in place, and one fused kernel.

`lower_attention` puts it in place of the function body of the same name in `vtexport.graph.nn_functions`. What was found
with TensorRT for RTX 1.7.1, in fp16, by the kernels in the plans that it builds:

- TensorScatter becomes TensorRT's KVCacheUpdate, which writes the new tokens into the buffer that holds the cache. It
  wants caches of static capacity.
- Attention becomes one fused kernel per profile, for prompts `_gemm_mha_v2` and for single tokens `_gemv_mha_v1`, at
  32/32, 32/8, 28/4 and 4/2 heads alike; key heads are shared inside it. TensorRT refuses it in fp32, and for single
  tokens with fewer than four query heads.
- Products and a softmax build everywhere, and are fused as well, but with keys and values repeated for every query head.
  A single query row of as many query heads as key heads crashes the builder if no profile has more rows.
"""

# The bodies are onnxscript: Python syntax that is never run as Python.
# mypy: ignore-errors

from typing import TypeVar, Union

import onnx_ir as ir
from onnxscript import BOOL, FLOAT, FLOAT16, INT64, script
from onnxscript.values import Opset

from vtexport.graph.nn_functions import nn

# The first opset that has TensorScatter; onnxscript has no module for it yet.
_OPSET = 24
op = Opset("", _OPSET)
T = TypeVar("T", bound=Union[FLOAT, FLOAT16])  # noqa: UP007 - onnxscript reads typing.Union only


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
    groups = op.Reshape(op.Constant(value_int=kv_heads), op.Constant(value_ints=[1]))
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    zeros = op.Constant(value_ints=[0, 0])
    rest = op.Constant(value_ints=[-1])
    one = op.Constant(value_ints=[1])
    split = op.Concat(zeros, groups, rest, axis=0)
    new_key = op.Transpose(op.Reshape(key, split), perm=[0, 2, 1, 3])
    new_value = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    present_key = op.TensorScatter(past_key, new_key, length, axis=2, mode="linear")
    present_value = op.TensorScatter(past_value, new_value, length, axis=2, mode="linear")
    q = op.Transpose(op.Reshape(query, op.Concat(zeros, heads, rest, axis=0)), perm=[0, 2, 1, 3])
    number = op.Squeeze(op.Shape(query, start=1, end=2))
    room = op.Squeeze(op.Shape(past_key, start=2, end=3))
    own = op.Unsqueeze(length, one) + op.Range(op.Constant(value_int=0), number, op.Constant(value_int=1))
    place = op.Range(op.Constant(value_int=0), room, op.Constant(value_int=1))
    seen = op.Unsqueeze(op.LessOrEqual(place, op.Unsqueeze(own, op.Constant(value_ints=[2]))), one)
    mixed = nn.MaskedAttention(q, present_key, present_value, seen, scale=scale)
    output = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return output, present_key, present_value


@script(nn, default_opset=op)
def Fused(query: T, key: T, value: T, seen: BOOL, scale: float) -> T:
    return op.Attention(query, key, value, seen, scale=scale)


@script(nn, default_opset=op)
def Products(query: T, key: T, value: T, seen: BOOL, scale: float) -> T:
    axis = op.Constant(value_ints=[2])
    one = op.Constant(value_ints=[1])
    heads, groups = op.Shape(query, start=1, end=2), op.Shape(key, start=1, end=2)
    repeats = op.Concat(one, one, heads / groups, one, one, axis=0)
    by_head = op.Concat(
        op.Constant(value_ints=[0]), heads, op.Constant(value_ints=[-1]), op.Shape(key, start=3, end=4), axis=0
    )
    keys = op.Reshape(op.Expand(op.Unsqueeze(key, axis), repeats), by_head)
    values = op.Reshape(op.Expand(op.Unsqueeze(value, axis), repeats), by_head)
    scaled = query * op.CastLike(op.Constant(value_float=scale), query)
    logits = op.MatMul(scaled, op.Transpose(keys, perm=[0, 1, 3, 2]))
    masked = op.Where(seen, logits, op.CastLike(op.Constant(value_float=float("-inf")), logits))
    return op.MatMul(op.Softmax(masked, axis=-1), values)


#: the fewest query heads for which TensorRT's fused kernel for a single token builds
_FEWEST = 4


def lower_attention(model: ir.Model) -> None:
    """Replace the body of attention to a cache in `model`, if it has one, by those above."""
    node = next((node for node in model.graph if node.op_type == "CachedAttention"), None)
    if node is None or node.op_identifier() not in model.functions:
        return
    fused = node.outputs[0].dtype != ir.DataType.FLOAT and node.attributes.get_int("num_heads") >= _FEWEST
    masked = (Fused if fused else Products).to_function_proto()
    masked.name = "MaskedAttention"
    for proto in (masked, CachedAttention.to_function_proto()):
        body = ir.serde.deserialize_function(proto)
        body.opset_imports.update(model.functions[node.op_identifier()].opset_imports)
        model.functions[body.identifier()] = body
    # From the opset in which graphs are traced, other operators only gained types.
    for scope in (model.graph, *model.functions.values()):
        scope.opset_imports[""] = _OPSET
