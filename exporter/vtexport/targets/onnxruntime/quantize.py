"""Weight-only quantisation: the decoder's linear layers in 8 or 4 bits, by ONNX Runtime's own quantizer and kernel.

Weights are quantised in blocks along their input channels, each with a scale and a zero point of its own
(`com.microsoft.MatMulNBits`); activations, the vision tower, embeddings and the head stay as they are, so that a vision
stage keeps the same tokens. Tensors are quantised one by one as they are written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from vtexport.graph.weights import Lazy
from vtexport.targets.base import Array

#: what `--quantize` may say -> bits a weight
BITS = {"int8": 8, "int4": 4}
#: input channels that share a scale and a zero point
BLOCK = 32
_LAYER = re.compile(r"decoder\.layers\.\d+\..*\.weight")
_PARTS = ("packed", "scales", "zero_points")


@dataclass(frozen=True)
class Encoded:
    """A weight [N, K] in blocks: packed [N, blocks, bytes] uint8, scales [N, blocks], zero_points [N, bytes] uint8."""

    packed: Array
    scales: Array
    zero_points: Array


def encode(weight: Array, bits: int) -> Encoded:
    """Quantise a weight [N, K], fp32 or fp16, by ONNX Runtime's quantizer."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    quantizer = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=BLOCK, bits=bits))
    packed, scales, zero_points = quantizer.qbits_block_quant(np.ascontiguousarray(weight.T))
    return Encoded(packed, scales.reshape(len(weight), -1), zero_points.reshape(len(weight), -1))


def rounded(weight: Array, bits: int) -> Array:
    """What weight [N, K] is worth after `encode`: the numbers that the kernel multiplies by, in its dtype."""
    encoded = encode(weight, bits)
    rows, columns = weight.shape
    levels, zero = (_unpacked(part.reshape(rows, -1), bits) for part in (encoded.packed, encoded.zero_points))
    blocks = encoded.scales.shape[1]
    centred = levels[:, : blocks * BLOCK].reshape(rows, blocks, BLOCK) - zero[:, :blocks, None]
    values: Array = (centred * encoded.scales[..., None].astype(np.float32)).reshape(rows, -1)[:, :columns]
    return values.astype(weight.dtype)


def _unpacked(packed: Array, bits: int) -> Array:
    """Bytes as numbers, int32; of two in a byte the low half comes first."""
    wide = packed.astype(np.int32)
    return wide if bits == 8 else np.stack([wide & 15, wide >> 4], axis=-1).reshape(len(packed), -1)


def quantize(models: Sequence[ir.Model], bits: int) -> dict[str, Lazy]:
    """Replace the products with the decoder's weights by MatMulNBits, in all `models`.

    Returns:
        by the names of the new initialisers, how each is made of the weight that it replaces.
    """
    sources: dict[str, Lazy] = {}
    encoder = _Encoder(bits)
    for model in models:
        for node in list(model.graph):
            name = _weight_of(node)
            if name is not None:
                sources |= _replace(model.graph, node, name, bits, encoder)
    return sources


def _weight_of(node: ir.Node) -> str | None:
    """The weight that a product is with, if it is one of the decoder's layers'."""
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
        return None
    name = transpose.inputs[0].name
    return name if name is not None and _LAYER.fullmatch(name) else None


def _replace(graph: ir.Graph, node: ir.Node, name: str, bits: int, encoder: _Encoder) -> dict[str, Lazy]:
    transpose = node.inputs[1].producer()  # type: ignore[union-attr]  # see _weight_of
    assert transpose is not None, "a weight comes transposed"
    weight = transpose.inputs[0]
    assert weight is not None, "what is transposed is a weight"
    assert weight.shape is not None, "weights have shapes"
    assert weight.dtype is not None, "weights have dtypes"
    rows, columns = (int(extent) for extent in weight.shape.numpy())
    blocks = -(-columns // BLOCK)
    extents = {
        "packed": (rows, blocks, BLOCK * bits // 8),
        "scales": (rows, blocks),
        "zero_points": (rows, -(-blocks * bits // 8)),
    }
    parts, found = [], {}
    for part in _PARTS:
        made = f"{name}.{part}"
        kind = weight.dtype if part == "scales" else ir.DataType.UINT8
        value = ir.Value(name=made, shape=ir.Shape(extents[part]), type=ir.TensorType(kind))
        value.const_value = ir.LazyTensor(_never, dtype=kind, shape=ir.Shape(extents[part]), name=made)
        graph.register_initializer(value)
        parts.append(value)
        found[made] = Lazy(name, weight.dtype, partial(encoder, part))
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK}
    values = [ir.AttrInt64(key, number) for key, number in attributes.items()]
    product = ir.Node("com.microsoft", "MatMulNBits", [node.inputs[0], *parts], values)
    old, new = node.outputs[0], product.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.insert_before(node, product)
    graph.remove(node, safe=True)
    if not transpose.outputs[0].uses():
        graph.remove(transpose, safe=True)
    if not weight.uses():
        del graph.initializers[name]
    graph.opset_imports["com.microsoft"] = 1
    return found


class _Encoder:
    """Encodes a weight once for the three tensors that it becomes, which are written one after the other."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._last: tuple[Array, Encoded] | None = None

    def __call__(self, part: str, weight: Array) -> Array:
        if self._last is None or self._last[0] is not weight:
            self._last = weight, encode(weight, self._bits)
        found: Array = getattr(self._last[1], part)
        return found


def _never() -> Any:
    raise AssertionError("a traced weight has no values before it is written")
