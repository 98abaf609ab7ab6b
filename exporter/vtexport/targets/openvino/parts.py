"""Transformer parts in the forms that OpenVINO's plugins fuse: `vtexport.nn` nodes without a cache.

Each function takes OpenVINO's outputs and returns outputs; contracts are in `vtexport.graph.nn_ops`. What a plugin makes
of them shows in the runtime model (`tests/targets/test_openvino.py` looks there):

- RMSNorm becomes `RMS`, if the square is a power and the norm a constant's product.
- Rotary becomes `RoPE`, if halves of [B, H, S, D] are rotated by tables [B, 1, S, D / 2].
- Attention becomes one `ScaledDotProductAttention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops


def constant(values: int | Sequence[int], kind: Any = np.int64) -> Any:
    """A constant of whole numbers."""
    return ops.constant(np.array(values, dtype=kind))


def port(x: Any) -> Any:
    """The output of a node that has one; an output is its own."""
    return x.output(0) if isinstance(x, ov.Node) else x


class Inputs:
    """Inputs that a model gets beside those of its graph.

    OpenVINO's reader takes no other inputs than the graph's. So until it is done, a constant stands for each.
    """

    def __init__(self) -> None:
        self._made: list[tuple[Any, Any]] = []

    def add(self, name: str, shape: Sequence[int], kind: Any) -> Any:
        """What stands for a new input; an extent of -1 is any, and a dtype `dynamic` the plugin's choice."""
        node = ops.parameter(ov.PartialShape(list(shape)), kind, name=name)
        node.output(0).set_names({name})
        there = ov.Type.f32 if kind == ov.Type.dynamic else kind
        held = ops.constant(np.zeros([max(extent, 0) for extent in shape], there.to_dtype()))
        self._made.append((held, node))
        return held.output(0)

    def put(self) -> list[Any]:
        """Put the inputs in the place of what stands for them, and return their nodes."""
        for held, node in self._made:
            held.output(0).replace(node.output(0))
        return [node for _, node in self._made]


def number(value: float, like: Any) -> Any:
    """A scalar of the element type of `like`."""
    return ops.constant(np.array(value, dtype=np.float32), dtype=port(like).get_element_type())


def width(x: Any) -> int:
    """The size of the last axis, which is static."""
    return int(port(x).get_partial_shape()[-1].get_length())


def extent(x: Any, axis: int) -> Any:
    """The size of one axis, a vector of one int64."""
    return ops.gather(ops.shape_of(x), constant([axis]), constant(0))


class Heads:
    """Splits rows [B, S, H * D] into heads [B, H, S, D] and merges them again.

    Rows that were merged from heads are not split again: OpenVINO would keep both transpositions.
    """

    def __init__(self) -> None:
        self._merged: dict[str, Any] = {}

    def split(self, x: Any, heads: int) -> Any:
        """[B, S, H * D] -> [B, H, S, D]."""
        known = self._merged.get(x.get_node().get_name())
        if known is not None:
            return known
        return ops.transpose(ops.reshape(x, constant([0, 0, heads, -1]), True), constant([0, 2, 1, 3]))

    def merge(self, x: Any) -> Any:
        """[B, H, S, D] -> [B, S, H * D]."""
        merged = ops.reshape(ops.transpose(x, constant([0, 2, 1, 3])), constant([0, 0, -1]), True)
        self._merged[merged.get_name()] = x
        return merged


def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """`vtexport.graph.nn_ops.rms_norm`."""
    kind = x.get_element_type()
    wide = x if kind == ov.Type.f32 else ops.convert(x, ov.Type.f32)
    gamma = weight if kind == ov.Type.f32 else ops.convert(weight, ov.Type.f32)
    mean = ops.reduce_mean(ops.power(wide, number(2, wide)), constant([-1]), True)
    normed = ops.multiply(wide, ops.power(ops.sqrt(ops.add(mean, number(epsilon, wide))), number(-1, wide)))
    result = ops.multiply(gamma, normed)
    return result if kind == ov.Type.f32 else ops.convert(result, kind)


def rotary(heads: Heads, x: Any, positions: Any, tables: tuple[Any, Any], num_heads: int) -> Any:
    """`vtexport.graph.nn_ops.rotary`; `tables` are cos and sin."""
    cos, sin = (ops.unsqueeze(ops.gather(table, positions, constant(0)), constant(1)) for table in tables)
    half = width(tables[0])
    low, high = ops.variadic_split(heads.split(x, num_heads), constant(-1), constant([half, half])).outputs()
    minus = ops.multiply(ops.multiply(high, sin), number(-1, x))
    turned = ops.concat(
        [ops.add(ops.multiply(low, cos), minus), ops.add(ops.multiply(high, cos), ops.multiply(low, sin))], -1
    )
    return heads.merge(turned)


def shared(x: Any, groups: int, num_heads: int) -> Any:
    """Keys or values [B, G, S, D] as every query head sees them, [B, H, S, D]; plugins fold this into attention."""
    if groups == num_heads:
        return x
    size = width(x)
    times = ops.concat([constant([1, 1]), constant([num_heads // groups]), constant([1, 1])], 0)
    wide = ops.broadcast(ops.unsqueeze(x, constant(2)), times, broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(wide, constant([0, num_heads, -1, size]), True)


def attention(query: Any, key: Any, value: Any, scale: float, mask: Any = None, causal: bool = False) -> Any:
    """Attention over heads [B, H, S, D], with a mask [B, 1, S, N] bool of what is seen, or causal."""
    if mask is None:
        # Without a mask there is no place for the scale; the query takes the difference to the default.
        size = width(query)
        factor = scale * size**0.5
        scaled = query if abs(factor - 1) < 1e-6 else ops.multiply(query, number(factor, query))
        return ops.scaled_dot_product_attention(scaled, key, value, causal=causal)
    return ops.scaled_dot_product_attention(query, key, value, mask, number(scale, query), causal=causal)


def compressed_product(x: Any, levels: Any, zero_points: Any, scales: Any, bits: int, rows: int, columns: int) -> Any:
    """X [..., K] times a weight [N, K] of `vtexport.targets.openvino.quantize`, in the pattern that plugins keep packed."""
    kind = port(x).get_element_type()
    number_of = int(port(levels).get_partial_shape()[1].get_length())
    if bits == 4:
        levels = _nibbles(levels, [rows, number_of, columns // number_of])
    centred = ops.subtract(ops.convert(levels, kind), ops.convert(zero_points, kind))
    weight = ops.reshape(ops.multiply(centred, scales), constant([rows, columns]), False)
    return ops.matmul(x, weight, False, True)


def _nibbles(packed: Any, shape: list[int]) -> Any:
    """The same bytes as a constant of 4-bit numbers."""
    data = packed.get_node().data
    return ops.constant(ov.Tensor(data, ov.Shape(shape), ov.Type.u4), shared_memory=True)
