"""Reshapes, joins, creates and casts tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch

from vtexport.graph.tracing.extent import Extent
from vtexport.graph.tracing.nodes import axis_of, cast, emit, operand, sizes_of, with_extents
from vtexport.graph.tracing.recorder import Kind, Recorder, Shape, Traced, converts


@converts("unsqueeze")
def unsqueeze(r: Recorder, x: Traced, dim: int) -> Traced:
    axis = dim if dim >= 0 else dim + x.ndim + 1
    shape = (*x.shape[:axis], 1, *x.shape[axis:])
    return emit(r, "Unsqueeze", [x, r.constant([axis])], Kind(x.dtype, shape))


@converts("transpose")
def transpose(r: Recorder, source: Any, first: int, second: int) -> Traced:
    x = r.tensor(source)
    order = list(range(x.ndim))
    a, b = axis_of(x, first), axis_of(x, second)
    order[a], order[b] = b, a
    return emit(r, "Transpose", [x], Kind(x.dtype, tuple(x.shape[axis] for axis in order)), perm=order)


@converts("reshape", "view")
def _reshape(r: Recorder, x: Traced, *sizes: Any) -> Traced:
    wanted = sizes_of(sizes)
    shape = [_left_over(x.shape, wanted) if size == -1 else size for size in wanted]
    # A zero takes the extent from the same axis of the input, and one axis may be left to the runtime as -1.
    given = [
        0 if isinstance(size, Extent) and axis < x.ndim and x.shape[axis] == size else size
        for axis, size in enumerate(shape)
    ]
    unknown = [axis for axis, size in enumerate(given) if isinstance(size, Extent)]
    if len(unknown) == 1:
        given[unknown[0]] = -1
    if tuple(shape) == x.shape:
        return x
    return emit(r, "Reshape", [x, r.extents(given)], Kind(x.dtype, tuple(shape)))


def _left_over(shape: Shape, wanted: Sequence[int]) -> int:
    """The extent that -1 stands for in `wanted`, where a tensor of `shape` is reshaped."""
    dynamic: list[int] = [size for size in shape if isinstance(size, Extent)]
    number = math.prod(size for size in shape if not isinstance(size, Extent))
    for size in wanted:
        if isinstance(size, Extent):
            dynamic.remove(size)
        elif size != -1 and number % size == 0:
            number //= size
        elif size != -1:
            (extent,) = dynamic
            dynamic = [extent // size]
    return reduce(lambda a, b: a * b, dynamic, number)


@converts("flatten")
def _flatten(r: Recorder, x: Traced, start_dim: int = 0, end_dim: int = -1) -> Traced:
    first, last = axis_of(x, start_dim), axis_of(x, end_dim)
    together = reduce(lambda a, b: a * b, x.shape[first : last + 1])
    return _reshape(r, x, [*x.shape[:first], together, *x.shape[last + 1 :]])


@converts("unflatten")
def _unflatten(r: Recorder, x: Traced, dim: int, sizes: Sequence[int]) -> Traced:
    axis = axis_of(x, dim)
    parts = [_left_over((x.shape[axis],), sizes) if size == -1 else size for size in sizes]
    return _reshape(r, x, [*x.shape[:axis], *parts, *x.shape[axis + 1 :]])


@converts("expand")
def _expand(r: Recorder, source: Any, *sizes: Any) -> Traced:
    x, wanted = r.tensor(source), sizes_of(sizes)
    padded = (1,) * (len(wanted) - x.ndim) + x.shape
    shape = tuple(old if new == -1 else new for old, new in zip(padded, wanted, strict=True))
    if shape == x.shape:
        return x
    # A one leaves an extent as it is.
    given = [1 if old == new else new for old, new in zip(padded, shape, strict=True)]
    expanded = emit(r, "Expand", [x, r.extents(given)], Kind(x.dtype, shape))
    r.expanded[expanded.value] = x
    return expanded


@converts("repeat_interleave")
def _repeat_interleave(r: Recorder, x: Traced, repeats: int, dim: int) -> Traced:
    axis = axis_of(x, dim)
    apart = unsqueeze(r, x, axis + 1)
    return _flatten(r, _expand(r, apart, [*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :]]), axis, axis + 1)


@converts("cat")
def _cat(r: Recorder, tensors: Sequence[Any], dim: int = 0) -> Traced:
    every = [r.tensor(tensor) for tensor in tensors]
    axis = axis_of(every[0], dim)
    parts = [tensor for tensor in every if isinstance(tensor.shape[axis], Extent) or tensor.shape[axis]] or every[:1]
    if len(parts) == 1:
        return parts[0]
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    total = reduce(lambda a, b: a + b, (part.shape[axis] for part in parts))
    inputs = [cast(r, part, dtype) for part in parts]
    return emit(r, "Concat", inputs, Kind(dtype, with_extents(parts[0].shape, axis, total)), axis=axis)


@converts("stack")
def _stack(r: Recorder, tensors: Sequence[Traced], dim: int = 0) -> Traced:
    return _cat(r, [unsqueeze(r, tensor, dim) for tensor in tensors], dim)


@converts("chunk")
def _chunk(r: Recorder, x: Traced, chunks: int, dim: int = 0) -> tuple[Traced, ...]:
    axis = axis_of(x, dim)
    each = Kind(x.dtype, with_extents(x.shape, axis, x.shape[axis] // chunks))
    return r.node("Split", [x], {"axis": axis, "num_outputs": chunks}, like=[each] * chunks)


@converts("arange")
def _arange(r: Recorder, number: int, *, dtype: torch.dtype = torch.int64, device: Any = None) -> Traced:
    if not isinstance(number, Extent):
        return r.constant(np.arange(number), dtype)
    places = emit(r, "Range", [r.constant(0), r.scalar(number), r.constant(1)], Kind(torch.int64, (number,)))
    return cast(r, places, dtype)


def _full(r: Recorder, shape: Sequence[int], value: float, dtype: torch.dtype) -> Traced:
    number = operand(r, value, dtype)
    return _expand(r, number, list(shape)) if shape else number


@converts("ones")
def _ones(r: Recorder, *shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Traced:
    return _full(r, sizes_of(shape), 1, dtype)


@converts("zeros")
def _zeros(r: Recorder, *shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Traced:
    return _full(r, sizes_of(shape), 0, dtype)


@converts("new_full")
def _new_full(r: Recorder, x: Traced, shape: Sequence[int], value: float) -> Traced:
    return _full(r, shape, value, x.dtype)


@converts("full_like")
def _full_like(r: Recorder, x: Traced, value: float, dtype: torch.dtype | None = None) -> Traced:
    return _full(r, x.shape, value, dtype or x.dtype)


@converts("ones_like")
def _ones_like(r: Recorder, x: Traced, dtype: torch.dtype | None = None) -> Traced:
    return _full_like(r, x, 1, dtype)


@converts("zeros_like")
def _zeros_like(r: Recorder, x: Traced, dtype: torch.dtype | None = None) -> Traced:
    return _full_like(r, x, 0, dtype)


@converts("to")
def _to(r: Recorder, x: Any, dtype: torch.dtype) -> Traced:
    return cast(r, r.tensor(x), dtype)


@converts("float")
def _float(r: Recorder, x: Any) -> Traced:
    return _to(r, x, torch.float32)


@converts("long")
def _long(r: Recorder, x: Any) -> Traced:
    return _to(r, x, torch.int64)
