"""Helpers for conversions: nodes of one output, operands in the dtype that torch computes in, shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vtexport.graph.tracing.extent import Extent
from vtexport.graph.tracing.recorder import TYPES, Kind, Recorder, Shape, Traced

#: dtypes that torch adds up in int64
INTEGERS = (torch.int64, torch.int32, torch.bool)


def emit(r: Recorder, op_type: str, inputs: Sequence[Any], kind: Kind, **attributes: Any) -> Traced:
    """The output of a node with a single output."""
    return r.node(op_type, inputs, attributes, like=[kind])[0]


def elementwise(r: Recorder, op_type: str, x: Any, **attributes: Any) -> Traced:
    """The output, like the input, of a node with a single input."""
    x = r.tensor(x)
    return emit(r, op_type, [x], Kind(x.dtype, x.shape), **attributes)


def cast(r: Recorder, x: Traced, dtype: torch.dtype) -> Traced:
    return x if x.dtype == dtype else emit(r, "Cast", [x], Kind(dtype, x.shape), to=int(TYPES[dtype]))


def promoted(a: Any, b: Any) -> torch.dtype:
    """The dtype that torch computes with for two operands, at least one of them a tensor."""
    dtypes = [x.dtype for x in (a, b) if isinstance(x, Traced | torch.Tensor)]
    if len(dtypes) == 2:
        return torch.promote_types(*dtypes)
    (number,) = (x for x in (a, b) if not isinstance(x, Traced | torch.Tensor))
    if isinstance(number, float) and dtypes[0] in INTEGERS:
        return torch.float32
    return torch.int64 if dtypes[0] == torch.bool and not isinstance(number, bool) else dtypes[0]


def operand(r: Recorder, x: Any, dtype: torch.dtype) -> Traced:
    """A tensor or a number in `dtype`; an extent is read when the graph runs."""
    if isinstance(x, Extent):
        return cast(r, r.scalar(x), dtype)
    return cast(r, r.tensor(x, dtype), dtype)


def operands(r: Recorder, a: Any, b: Any, dtype: torch.dtype) -> tuple[list[Traced], Shape]:
    pair = [operand(r, x, dtype) for x in (a, b)]
    return pair, broadcast(*(x.shape for x in pair))


def broadcast(*shapes: Shape) -> Shape:
    """The shape that tensors of `shapes` broadcast to.

    Raises:
        ValueError: they do not broadcast.
    """
    rank, shape = max(map(len, shapes)), []
    for axis in range(rank):
        sizes = [extents[axis - rank] for extents in shapes if axis - rank >= -len(extents)]
        wide = {size for size in sizes if size != 1}
        if len(wide) > 1:
            raise ValueError(f"shapes {', '.join(map(str, shapes))} do not broadcast")
        shape.append(wide.pop() if wide else 1)
    return tuple(shape)


def axis_of(x: Traced, dim: int) -> int:
    return dim + x.ndim if dim < 0 else dim


def with_extents(shape: Shape, axis: int, *sizes: int) -> Shape:
    """`shape` with `sizes` in place of the extent at `axis`."""
    return (*shape[:axis], *sizes, *shape[axis + 1 :])


def sizes_of(given: Sequence[Any]) -> list[int]:
    """Sizes given one by one or as one sequence."""
    return list(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else list(given)
