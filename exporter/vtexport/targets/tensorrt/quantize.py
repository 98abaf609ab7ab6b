"""8 and 4 bits on TensorRT: DequantizeLinear before the product, which its builder fuses into a weight-only kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from vtexport.arrays import Array
from vtexport.targets.quantize import Scheme, block_quantizer

#: input channels that share a scale in 4 bits, a size that TensorRT has kernels for
BLOCK = 64
_OPSET = 21


class _Dequantized(Scheme):
    """Levels [K, N] and scales; symmetric, so that there are no zero points."""

    parts: ClassVar[tuple[str, ...]] = ("levels", "scales")

    def _dequantize(self, parts: Sequence[ir.Value], attributes: Mapping[str, int]) -> ir.Node:
        values = [ir.AttrInt64(key, number) for key, number in attributes.items()]
        return ir.Node("", "DequantizeLinear", parts, values)

    def opset(self) -> Mapping[str, int]:
        # Graphs are traced in opset 18; from there to 21, operators only gained types.
        return {"": _OPSET}


class Channels(_Dequantized):
    """A scale for each output channel [N]; levels int8, or fp8 (e4m3, whose largest number is 448)."""

    def __init__(self, kind: ir.DataType, storage: type[np.generic], largest: float) -> None:
        self.kind, self.storage, self.largest = kind, storage, largest

    def tensors(self, rows: int, columns: int, dtype: ir.DataType) -> Sequence[tuple[ir.DataType, tuple[int, ...]]]:
        return [(self.kind, (columns, rows)), (dtype, (rows,))]

    def encode(self, weight: Array) -> Sequence[Array]:
        wide = weight.astype(np.float32)
        scales = np.maximum(np.abs(wide).max(axis=1) / self.largest, np.finfo(np.float16).tiny).astype(weight.dtype)
        levels = np.clip(wide / scales[:, None].astype(np.float32), -self.largest, self.largest)
        if self.kind == ir.DataType.INT8:
            levels = np.rint(levels)
        return [np.ascontiguousarray(levels.T).astype(self.storage), scales]

    def rounded(self, weight: Array) -> Array:
        levels, scales = self.encode(weight)
        return np.ascontiguousarray(levels.T.astype(weight.dtype) * scales[:, None])

    def product(self, x: ir.Value, parts: Sequence[ir.Value], rows: int, columns: int) -> Sequence[ir.Node]:
        weight = self._dequantize(parts, {"axis": 1})
        return [weight, ir.Node("", "MatMul", [x, weight.outputs[0]])]


class Blocks(_Dequantized):
    """A scale for every `BLOCK` input channels of an output channel, [blocks, N]; levels int4."""

    def tensors(self, rows: int, columns: int, dtype: ir.DataType) -> Sequence[tuple[ir.DataType, tuple[int, ...]]]:
        return [(ir.DataType.INT4, (columns, rows)), (dtype, (-(-columns // BLOCK), rows))]

    def encode(self, weight: Array) -> Sequence[Array]:
        from onnxruntime.quantization import QuantFormat

        quantizer = block_quantizer(block_size=BLOCK, bits=4, is_symmetric=True, quant_format=QuantFormat.QDQ)
        packed, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(weight.T))
        return [packed, scales]

    def rounded(self, weight: Array) -> Array:
        packed, scales = self.encode(weight)
        rows, columns = weight.shape
        halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: rows * columns].astype(np.int32)
        levels = np.where(halves > 7, halves - 16, halves).reshape(columns, rows)
        values: Array = levels.astype(weight.dtype) * np.repeat(scales, BLOCK, axis=0)[:columns]
        return np.ascontiguousarray(values.T)

    def product(self, x: ir.Value, parts: Sequence[ir.Value], rows: int, columns: int) -> Sequence[ir.Node]:
        weight = self._dequantize(parts, {"axis": 0, "block_size": BLOCK})
        return [weight, ir.Node("", "MatMul", [x, weight.outputs[0]])]


#: schemes by the value of `--quantize`
SCHEMES: dict[str, Scheme] = {
    "int8": Channels(ir.DataType.INT8, np.int8, 127.0),
    "fp8": Channels(ir.DataType.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn, 448.0),
    "int4": Blocks(),
}
