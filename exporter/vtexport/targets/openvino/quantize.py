"""8 and 4 bits on OpenVINO: weights that its plugins keep compressed and multiply by as they are.

A weight is `(levels - zero_point) * scale` with one scale and zero point per block of input channels. The reader writes
that as OpenVINO's plugins recognise it (Convert, Subtract, Multiply, Reshape), so that they never unpack it whole. The
CPU plugin rounds the activations that such a weight multiplies to 8 bits (`vtexport.targets.openvino.settings`), which
takes a third off a prompt's time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from vtexport.arrays import Array
from vtexport.targets.openvino.lowering import OWN
from vtexport.targets.quantize import Scheme

#: input channels that share a scale and a zero point at 4 bits, where they divide the weight's
BLOCK = 128


def block_of(columns: int, bits: int) -> int:
    """All channels at 8 bits, which plugins multiply by fastest; at 4, `BLOCK` halved until it divides `columns`."""
    block = columns if bits == 8 else BLOCK
    while columns % block:
        block //= 2
    return block


class Compressed(Scheme):
    """Levels [N, blocks, block], zero points and scales [N, blocks, 1]; two levels of 4 bits in a byte."""

    parts: ClassVar[tuple[str, ...]] = ("levels", "zero_points", "scales")
    rounds_activations = True
    takes_bf16 = True

    def __init__(self, bits: int) -> None:
        self.bits = bits

    @property
    def head(self) -> Scheme:
        return Compressed(8)

    def tensors(self, rows: int, columns: int, dtype: ir.DataType) -> Sequence[tuple[ir.DataType, tuple[int, ...]]]:
        block = block_of(columns, self.bits)
        return [
            (ir.DataType.UINT8, (rows, columns // block, block * self.bits // 8)),
            (ir.DataType.UINT8, (rows, columns // block, 1)),
            (dtype, (rows, columns // block, 1)),
        ]

    def encode(self, weight: Array) -> Sequence[Array]:
        levels, zero, scale = self._levels(weight)
        if self.bits == 4:
            levels = levels[..., 0::2] | (levels[..., 1::2] << 4)
        return [levels, zero, scale.astype(weight.dtype)]

    def rounded(self, weight: Array) -> Array:
        levels, zero, scale = self._levels(weight)
        values: Array = (levels.astype(np.float32) - zero) * scale.astype(weight.dtype).astype(np.float32)
        return values.reshape(weight.shape).astype(weight.dtype)

    def product(self, x: ir.Value, parts: Sequence[ir.Value], rows: int, columns: int) -> Sequence[ir.Node]:
        sizes = {"bits": self.bits, "rows": rows, "columns": columns}
        return [ir.Node(OWN, "CompressedProduct", [x, *parts], [ir.AttrInt64(*size) for size in sizes.items()])]

    def opset(self) -> Mapping[str, int]:
        return {OWN: 1}

    def _levels(self, weight: Array) -> tuple[Array, Array, Array]:
        """Levels [N, blocks, block] and zero points [N, blocks, 1], uint8, and scales [N, blocks, 1] fp32."""
        blocks = weight.astype(np.float32).reshape(len(weight), -1, block_of(weight.shape[1], self.bits))
        # Zero is always a level, so that both ends of the range have a sign.
        low = np.minimum(blocks.min(axis=2, keepdims=True), 0)
        high = np.maximum(blocks.max(axis=2, keepdims=True), 0)
        most = 2**self.bits - 1
        scale = ((high - low) / most).astype(weight.dtype).astype(np.float32)
        scale[scale == 0] = 1
        zero = np.clip(np.rint(-low / scale), 0, most)
        levels = np.clip(np.rint(blocks / scale) + zero, 0, most)
        return levels.astype(np.uint8), zero.astype(np.uint8), scale


#: schemes by the value of `--quantize`
SCHEMES: dict[str, Scheme] = {"int8": Compressed(8), "int4": Compressed(4)}
