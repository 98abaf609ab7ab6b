"""Layers and activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vtexport.graph.tracing.arithmetic import add, div, matmul, mul, power
from vtexport.graph.tracing.nodes import axis_of, elementwise, emit
from vtexport.graph.tracing.recorder import Kind, Recorder, Traced, converts
from vtexport.graph.tracing.shapes import transpose


@converts("linear")
def _linear(r: Recorder, x: Traced, weight: Any, bias: Any = None) -> Traced:
    product = matmul(r, x, transpose(r, weight, 0, 1))
    return product if bias is None else add(r, product, bias)


@converts("layer_norm")
def _layer_norm(r: Recorder, x: Traced, _shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Traced:
    return emit(r, "LayerNormalization", [x, weight, bias], Kind(x.dtype, x.shape), axis=-1, epsilon=float(eps))


@converts("conv2d")
def _conv2d(
    r: Recorder, x: Traced, weight: Any, bias: Any, stride: Sequence[int], padding: Any, dilation: Any, groups: int
) -> Traced:
    weight = r.tensor(weight)
    kernel = weight.shape[2:]
    if (tuple(padding), tuple(dilation), groups) != ((0, 0), (1, 1), 1):
        raise NotImplementedError("a convolution that pads, dilates or groups")
    extents = [(size - width) // step + 1 for size, width, step in zip(x.shape[2:], kernel, stride, strict=True)]
    inputs = [x, weight] if bias is None else [x, weight, bias]
    kind = Kind(x.dtype, (x.shape[0], weight.shape[0], *extents))
    return emit(r, "Conv", inputs, kind, strides=list(stride), kernel_shape=list(kernel))


@converts("softmax")
def _softmax(r: Recorder, x: Traced, dim: int, *_: Any, **__: Any) -> Traced:
    return elementwise(r, "Softmax", x, axis=axis_of(x, dim))


@converts("sigmoid")
def _sigmoid(r: Recorder, x: Traced) -> Traced:
    return elementwise(r, "Sigmoid", x)


@converts("tanh")
def _tanh(r: Recorder, x: Traced) -> Traced:
    return elementwise(r, "Tanh", x)


@converts("relu")
def _relu(r: Recorder, x: Traced, inplace: bool = False) -> Traced:
    return elementwise(r, "Relu", x)


@converts("silu")
def _silu(r: Recorder, x: Traced, inplace: bool = False) -> Traced:
    return mul(r, x, _sigmoid(r, x))


@converts("gelu")
def _gelu(r: Recorder, x: Traced, approximate: str = "none") -> Traced:
    # Opset 18 has no Gelu; runtimes fuse these forms into one.
    if approximate == "tanh":
        cubic = add(r, x, mul(r, power(r, x, 3.0), 0.044715))
        inner = elementwise(r, "Tanh", mul(r, cubic, math.sqrt(2 / math.pi)))
        return mul(r, mul(r, x, add(r, inner, 1.0)), 0.5)
    inner = add(r, elementwise(r, "Erf", div(r, x, math.sqrt(2))), 1.0)
    return mul(r, mul(r, x, inner), 0.5)
