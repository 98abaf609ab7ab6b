"""8 and 4 bits on ONNX Runtime: blocks with a scale and a zero point each, by its own quantizer and kernel.

The kernel rounds activations to 8 bits, in blocks of the same channels with a scale each, and multiplies whole numbers.
Without that (accuracy level 0), one of 8 bits takes more than ten times as long as a plain product for single tokens,
and one of 4 bits saves no time for prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from vtexport.arrays import Array
from vtexport.targets.quantize import Scheme, block_quantizer

#: input channels that share a scale and a zero point; with fewer, prompts take up to 1.7 times as long
BLOCK = 128
#: the accuracy level of `MatMulNBits` at which it rounds activations to 8 bits
_INT8 = 4


class NBits(Scheme):
    """`com.microsoft.MatMulNBits`: packed [N, blocks, bytes] uint8, scales [N, blocks], zero_points [N, bytes] uint8."""

    parts: ClassVar[tuple[str, ...]] = ("packed", "scales", "zero_points")
    rounds_activations = True

    def __init__(self, bits: int) -> None:
        self.bits = bits

    @property
    def head(self) -> Scheme:
        return NBits(8)

    def tensors(self, rows: int, columns: int, dtype: ir.DataType) -> Sequence[tuple[ir.DataType, tuple[int, ...]]]:
        blocks, packed = -(-columns // BLOCK), ir.DataType.UINT8
        return [
            (packed, (rows, blocks, BLOCK * self.bits // 8)),
            (dtype, (rows, blocks)),
            (packed, (rows, -(-blocks * self.bits // 8))),
        ]

    def encode(self, weight: Array) -> Sequence[Array]:
        quantizer = block_quantizer(block_size=BLOCK, bits=self.bits)
        packed, scales, zero_points = quantizer.qbits_block_quant(np.ascontiguousarray(weight.T))
        return [packed, scales.reshape(len(weight), -1), zero_points.reshape(len(weight), -1)]

    def rounded(self, weight: Array) -> Array:
        packed, scales, zero_points = self.encode(weight)
        rows, columns = weight.shape
        levels, zero = (self._unpacked(part.reshape(rows, -1)) for part in (packed, zero_points))
        blocks = scales.shape[1]
        centred = levels[:, : blocks * BLOCK].reshape(rows, blocks, BLOCK) - zero[:, :blocks, None]
        values: Array = (centred * scales[..., None].astype(np.float32)).reshape(rows, -1)[:, :columns]
        return values.astype(weight.dtype)

    def _unpacked(self, packed: Array) -> Array:
        """The numbers in the bytes, int32; of two in a byte, the low half comes first."""
        wide = packed.astype(np.int32)
        return wide if self.bits == 8 else np.stack([wide & 15, wide >> 4], axis=-1).reshape(len(packed), -1)

    def product(self, x: ir.Value, parts: Sequence[ir.Value], rows: int, columns: int) -> Sequence[ir.Node]:
        attributes = {"K": columns, "N": rows, "bits": self.bits, "block_size": BLOCK, "accuracy_level": _INT8}
        values = [ir.AttrInt64(key, number) for key, number in attributes.items()]
        return [ir.Node("com.microsoft", "MatMulNBits", [x, *parts], values)]

    def opset(self) -> Mapping[str, int]:
        return {"com.microsoft": 1}


#: schemes by the value of `--quantize`
SCHEMES: dict[str, Scheme] = {"int8": NBits(8), "int4": NBits(4)}
