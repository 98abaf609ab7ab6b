"""Whether quantised weights save time on this machine: one product, with the weight as it was and as it became."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from vtexport.arrays import Array
from vtexport.targets.quantize import Scheme

#: a weight's extents are cut to this, so that a measurement takes no more than some seconds
LARGEST = 4096
#: tokens per product: a decode step, and a prompt with its image pruned
TOKENS = {"per token": 1, "for prompts": 128}
#: runs of each form, in turns
RUNS = 9
#: bytes written before each run, so that weights come from memory, as in a model of many layers
FLUSH = 64 << 20
#: below this ratio of times, the difference may be noise
SLOWER = 1.25


@dataclass(frozen=True)
class Timed:
    """Median milliseconds of one product with a weight [rows, columns], by the names of `TOKENS`."""

    rows: int
    columns: int
    plain: dict[str, float]
    quantised: dict[str, float]

    def warning(self, name: str, dtype: str) -> str | None:
        """What a user of `--quantize name` should know, if that is slower than weights in `dtype`."""
        ratios = {stage: self.quantised[stage] / self.plain[stage] for stage in self.plain}
        slower = [f"{ratio:.1f} times as long {stage}" for stage, ratio in ratios.items() if ratio > SLOWER]
        if not slower:
            return None
        return (
            f"{name} weights make ONNX Runtime slower on this machine: a product with a weight of "
            f"[{self.rows}, {self.columns}] takes {' and '.join(slower)} as with {dtype} weights; compare the bundle with "
            f"one without --quantize (vtexport profile) before you deploy it"
        )


def measure(scheme: Scheme, rows: int, columns: int, dtype: ir.DataType) -> Timed:
    """Time a product with a random weight [rows, columns], at most `LARGEST` each, plain and by `scheme`."""
    rows, columns = min(rows, LARGEST), min(columns, LARGEST)
    random = np.random.default_rng(0)
    weight = (random.standard_normal((rows, columns), np.float32) / columns**0.5).astype(dtype.numpy())
    sessions = [_session(None, weight, dtype), _session(scheme, weight, dtype)]
    flush = np.zeros(FLUSH, np.uint8)
    medians: list[dict[str, float]] = [{}, {}]
    for stage, tokens in TOKENS.items():
        x = random.standard_normal((tokens, columns), np.float32).astype(dtype.numpy())
        times: list[list[float]] = [[], []]
        for _ in range(RUNS):
            for session, seen in zip(sessions, times, strict=True):
                flush += 1
                start = time.perf_counter()
                session.run(None, {"x": x})
                seen.append(1000 * (time.perf_counter() - start))
        for median, seen in zip(medians, times, strict=True):
            median[stage] = statistics.median(seen)
    return Timed(rows, columns, *medians)


def _session(scheme: Scheme | None, weight: Array, dtype: ir.DataType) -> ort.InferenceSession:
    """A session of x [T, K] times a weight [N, K] transposed, y [T, N]."""
    rows, columns = weight.shape
    x = ir.Value(name="x", shape=ir.Shape(["tokens", columns]), type=ir.TensorType(dtype))
    if scheme is None:
        parts = [_constant("weight", dtype, weight.T.copy())]
        nodes: Sequence[ir.Node] = [ir.node("MatMul", [x, *parts])]
    else:
        kinds = scheme.tensors(rows, columns, dtype)
        parts = [
            _constant(name, kind, array)
            for name, array, (kind, _) in zip(scheme.parts, scheme.encode(weight), kinds, strict=True)
        ]
        nodes = scheme.product(x, parts, rows, columns)
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(dtype), ir.Shape(["tokens", rows])
    opsets = {"": 18, **(scheme.opset() if scheme is not None else {})}
    graph = ir.Graph([x], [y], nodes=nodes, initializers=parts, opset_imports=opsets)
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


def _constant(name: str, dtype: ir.DataType, array: Array) -> ir.Value:
    tensor = ir.Tensor(array, dtype=dtype, name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
