"""Reductions, and parts of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vtexport.graph.tracing.extent import Extent
from vtexport.graph.tracing.nodes import INTEGERS, axis_of, cast, emit, with_extents
from vtexport.graph.tracing.recorder import Kind, Recorder, Shape, Traced, converts
from vtexport.graph.tracing.shapes import unsqueeze


class Top(NamedTuple):
    """What `topk` returns."""

    values: Traced
    indices: Traced


def _reduced(x: Traced, dim: int | Sequence[int], keepdim: bool) -> tuple[list[int], Shape]:
    axes = sorted(axis_of(x, number) for number in ([dim] if isinstance(dim, int) else dim))
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    return axes, tuple(size for axis, size in enumerate(shape) if keepdim or axis not in axes)


def _reduce(r: Recorder, op_type: str, x: Traced, dim: int | Sequence[int], keepdim: bool) -> Traced:
    axes, shape = _reduced(x, dim, keepdim)
    return emit(r, op_type, [x, r.constant(axes)], Kind(x.dtype, shape), keepdims=int(keepdim))


@converts("sum")
def _sum(r: Recorder, x: Traced, dim: int | Sequence[int], keepdim: bool = False) -> Traced:
    return _reduce(r, "ReduceSum", cast(r, x, torch.int64) if x.dtype in INTEGERS else x, dim, keepdim)


@converts("mean")
def _mean(r: Recorder, x: Traced, dim: int | Sequence[int], keepdim: bool = False) -> Traced:
    return _reduce(r, "ReduceMean", x, dim, keepdim)


@converts("amax")
def _amax(r: Recorder, x: Traced, dim: int | Sequence[int], keepdim: bool = False) -> Traced:
    return _reduce(r, "ReduceMax", x, dim, keepdim)


@converts("amin")
def _amin(r: Recorder, x: Traced, dim: int | Sequence[int], keepdim: bool = False) -> Traced:
    return _reduce(r, "ReduceMin", x, dim, keepdim)


@converts("cumsum")
def _cumsum(r: Recorder, x: Traced, dim: int) -> Traced:
    x = cast(r, x, torch.int64) if x.dtype in INTEGERS else x
    return emit(r, "CumSum", [x, r.constant(axis_of(x, dim))], Kind(x.dtype, x.shape))


@converts("topk")
def _topk(r: Recorder, x: Traced, k: int, dim: int = -1, largest: bool = True) -> Top:
    axis = axis_of(x, dim)
    shape = with_extents(x.shape, axis, k)
    kinds = [Kind(x.dtype, shape), Kind(torch.int64, shape)]
    attributes = {"axis": axis, "largest": int(largest), "sorted": 1}
    return Top(*r.node("TopK", [x, r.extents([k])], attributes, like=kinds))


@converts("gather")
def _gather(r: Recorder, x: Traced, dim: int, index: Traced) -> Traced:
    axis = axis_of(x, dim)
    rows = _rows(x, axis, index)
    if rows is not None:
        return emit(r, "GatherND", [x, rows], Kind(x.dtype, index.shape), batch_dims=1)
    return emit(r, "GatherElements", [x, index], Kind(x.dtype, index.shape), axis=axis)


def _rows(x: Traced, axis: int, index: Traced) -> Traced | None:
    """The index [B, R, 1] of whole rows of x [B, V, C], if that is what `index` was expanded from; else None."""
    source = index.value.producer()
    if source is None or source.op_type != "Expand" or (x.ndim, axis) != (3, 1) or index.shape[2] != x.shape[2]:
        return None
    narrow = index.recorder.expanded[index.value]
    return narrow if narrow.shape == (*index.shape[:2], 1) else None


@converts("scatter")
def _scatter(r: Recorder, x: Traced, dim: int, index: Traced, source: Traced) -> Traced:
    return emit(r, "ScatterElements", [x, index, source], Kind(x.dtype, x.shape), axis=axis_of(x, dim))


@converts("index_select")
def _index_select(r: Recorder, x: Any, dim: int, index: Any) -> Traced:
    x, index = r.tensor(x), r.tensor(index)
    axis = axis_of(x, dim)
    return emit(r, "Gather", [x, index], Kind(x.dtype, with_extents(x.shape, axis, *index.shape)), axis=axis)


@converts("embedding")
def _embedding(r: Recorder, ids: Traced, weight: Any, *_: Any, **__: Any) -> Traced:
    return _index_select(r, weight, 0, ids)


@converts("getitem", "__getitem__")
def _getitem(r: Recorder, source: Any, key: Any) -> Traced:
    x, keys = r.tensor(source), list(key) if isinstance(key, tuple) else [key]
    if isinstance(keys[0], Traced) and len(keys) == 1:
        return _index_select(r, x, 0, keys[0])
    if Ellipsis in keys:
        place = keys.index(Ellipsis)
        missing = x.ndim - sum(part is not None for part in keys) + 1
        keys[place : place + 1] = [slice(None)] * missing
    axis = 0
    for part in keys:
        if part is None:
            x = unsqueeze(r, x, axis)
        elif isinstance(part, slice):
            x = _slice(r, x, axis, part)
        else:
            x = emit(r, "Gather", [x, r.constant(part)], Kind(x.dtype, with_extents(x.shape, axis)), axis=axis)
            axis -= 1
        axis += 1
    return x


def _slice(r: Recorder, x: Traced, axis: int, part: slice) -> Traced:
    size = x.shape[axis]
    if part == slice(None):
        return x
    known = not any(isinstance(bound, Extent) for bound in (part.start, part.stop))
    if not isinstance(size, Extent) and known:
        start, stop, step = part.indices(size)
        length = max(0, -(-(stop - start) // step))
    elif isinstance(size, Extent) and part.step is None and part.stop is None and known:
        start, stop, step = part.start, np.iinfo(np.int64).max, 1
        length = size - start if start >= 0 else -start
    elif isinstance(size, Extent) and part.step is None and part.start is None and known and part.stop >= 0:
        start, stop, step = 0, part.stop, 1
        length = part.stop
    else:  # the number of elements depends on the extents' values
        raise NotImplementedError(f"{part} of {size} elements")
    bounds = [r.constant([number]) for number in (start, stop, axis, step)]
    return emit(r, "Slice", [x, *bounds], Kind(x.dtype, with_extents(x.shape, axis, length)))
