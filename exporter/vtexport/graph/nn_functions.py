"""ONNX function bodies of the domain `vtexport.nn`; see `vtexport.graph.functions`, contracts in `nn_ops`."""

# The bodies are onnxscript: Python syntax that is never run as Python.
# mypy: ignore-errors

from typing import TypeVar, Union

from onnxscript import FLOAT, FLOAT16, INT64, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

from vtexport.graph.domains import DOMAIN_VERSION, NN

nn = Opset(NN, DOMAIN_VERSION)
T = TypeVar("T", bound=Union[FLOAT, FLOAT16])  # noqa: UP007 - onnxscript reads typing.Union only


@script(nn, default_opset=op)
def RMSNorm(x: T, weight: T, epsilon: float) -> T:
    wide = op.Cast(x, to=FLOAT.dtype)
    # A power, not a product: ONNX Runtime recognises the norm by it, and fuses it.
    mean = op.ReduceMean(op.Pow(wide, op.Constant(value_float=2.0)), op.Constant(value_ints=[-1]), keepdims=1)
    normed = wide / op.Sqrt(mean + op.Constant(value_float=epsilon))
    return op.CastLike(normed, x) * weight


@script(nn, default_opset=op)
def Rotary(x: T, positions: INT64, cos: T, sin: T, num_heads: int) -> T:
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    zeros = op.Constant(value_ints=[0, 0])
    split = op.Reshape(x, op.Concat(zeros, heads, op.Constant(value_ints=[-1]), axis=0))
    low, high = op.Split(split, axis=3, num_outputs=2)
    c = op.Unsqueeze(op.Gather(cos, positions), op.Constant(value_ints=[2]))
    s = op.Unsqueeze(op.Gather(sin, positions), op.Constant(value_ints=[2]))
    turned = op.Concat(low * c - high * s, high * c + low * s, axis=3)
    return op.Reshape(turned, op.Constant(value_ints=[0, 0, -1]))


@script(nn, default_opset=op)
def FullAttention(query: T, key: T, value: T, num_heads: int, scale: float) -> T:
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    shape = op.Concat(op.Constant(value_ints=[0, 0]), heads, op.Constant(value_ints=[-1]), axis=0)
    scaled = query * op.CastLike(op.Constant(value_float=scale), query)
    q = op.Transpose(op.Reshape(scaled, shape), perm=[0, 2, 1, 3])
    k = op.Transpose(op.Reshape(key, shape), perm=[0, 2, 3, 1])
    v = op.Transpose(op.Reshape(value, shape), perm=[0, 2, 1, 3])
    mixed = op.MatMul(op.Softmax(op.MatMul(q, k), axis=-1), v)
    return op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))


@script(nn, default_opset=op)
def CausalAttention(query: T, key: T, value: T, num_heads: int, kv_heads: int, scale: float) -> tuple[T, T, T]:
    groups = op.Reshape(op.Constant(value_int=kv_heads), op.Constant(value_ints=[1]))
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    zeros = op.Constant(value_ints=[0, 0])
    rest = op.Constant(value_ints=[-1])
    cache_shape = op.Concat(zeros, groups, rest, axis=0)
    present_key = op.Transpose(op.Reshape(key, cache_shape), perm=[0, 2, 1, 3])
    present_value = op.Transpose(op.Reshape(value, cache_shape), perm=[0, 2, 1, 3])
    # Five axes [B, G, H / G, S, D]: the heads of a group share its keys by broadcasting, so nothing is copied.
    scaled = query * op.CastLike(op.Constant(value_float=scale), query)
    shape = op.Concat(zeros, groups, heads / groups, rest, axis=0)
    q = op.Transpose(op.Reshape(scaled, shape), perm=[0, 2, 3, 1, 4])
    axis = op.Constant(value_ints=[2])
    k = op.Unsqueeze(op.Transpose(present_key, perm=[0, 1, 3, 2]), axis)
    logits = op.MatMul(q, k)
    rows = op.Squeeze(op.Shape(query, start=1, end=2))
    place = op.Range(op.Constant(value_int=0), rows, op.Constant(value_int=1))
    seen = op.LessOrEqual(
        op.Unsqueeze(place, op.Constant(value_ints=[0])), op.Unsqueeze(place, op.Constant(value_ints=[1]))
    )
    masked = op.Where(seen, logits, op.CastLike(op.Constant(value_float=float("-inf")), logits))
    mixed = op.MatMul(op.Softmax(masked, axis=-1), op.Unsqueeze(present_value, axis))
    output = op.Reshape(op.Transpose(mixed, perm=[0, 3, 1, 2, 4]), op.Constant(value_ints=[0, 0, -1]))
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
    groups = op.Reshape(op.Constant(value_int=kv_heads), op.Constant(value_ints=[1]))
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    room = op.Squeeze(op.Shape(past_key, start=2, end=3))
    place = op.Range(op.Constant(value_int=0), room, op.Constant(value_int=1))
    number = op.Squeeze(op.Shape(query, start=1, end=2))
    new = op.Range(op.Constant(value_int=0), number, op.Constant(value_int=1))
    before = op.Unsqueeze(length, one)
    # Which of the new tokens each place of the cache would get, [B, M]; the nearest one if it gets none.
    source = place - before
    within = op.Clip(source, op.Constant(value_int=0), op.Unsqueeze(number, zero) - one)
    gets = op.And(op.GreaterOrEqual(source, op.Constant(value_int=0)), op.Less(source, number))
    slot = op.Unsqueeze(gets, op.Constant(value_ints=[1, 3]))
    gathered = op.Unsqueeze(within, op.Constant(value_ints=[2]))
    split = op.Concat(zero, zero, groups, rest, axis=0)
    new_key = op.Transpose(op.Reshape(op.GatherND(key, gathered, batch_dims=1), split), perm=[0, 2, 1, 3])
    new_value = op.Transpose(op.Reshape(op.GatherND(value, gathered, batch_dims=1), split), perm=[0, 2, 1, 3])
    present_key = op.Where(slot, new_key, past_key)
    present_value = op.Where(slot, new_value, past_value)
    scaled = query * op.CastLike(op.Constant(value_float=scale), query)
    by_head = op.Reshape(scaled, op.Concat(zero, zero, groups, heads / groups, rest, axis=0))
    axis = op.Constant(value_ints=[2])
    logits = op.MatMul(
        op.Transpose(by_head, perm=[0, 2, 3, 1, 4]), op.Unsqueeze(op.Transpose(present_key, perm=[0, 1, 3, 2]), axis)
    )
    own = before + new
    seen = op.LessOrEqual(place, op.Unsqueeze(own, op.Constant(value_ints=[1, 2, 4])))
    masked = op.Where(seen, logits, op.CastLike(op.Constant(value_float=float("-inf")), logits))
    mixed = op.MatMul(op.Softmax(masked, axis=-1), op.Unsqueeze(present_value, axis))
    output = op.Reshape(op.Transpose(mixed, perm=[0, 3, 1, 2, 4]), op.Constant(value_ints=[0, 0, -1]))
    return output, present_key, present_value


NN_FUNCTIONS = (RMSNorm, Rotary, FullAttention, CausalAttention, CachedAttention)
