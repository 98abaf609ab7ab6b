"""Arithmetic, comparison and logic, entry by entry; matrix products."""

from __future__ import annotations

from typing import Any

import torch

from vtexport.graph.tracing.nodes import INTEGERS, broadcast, elementwise, emit, operands, promoted
from vtexport.graph.tracing.recorder import Kind, Recorder, Traced, converts


def binary(r: Recorder, op_type: str, a: Any, b: Any, dtype: torch.dtype | None = None) -> Traced:
    dtype = dtype or promoted(a, b)
    pair, shape = operands(r, a, b, dtype)
    return emit(r, op_type, pair, Kind(dtype, shape))


@converts("add", "__add__", "__radd__")
def add(r: Recorder, a: Any, b: Any) -> Traced:
    return binary(r, "Add", a, b)


@converts("sub", "__sub__")
def _sub(r: Recorder, a: Any, b: Any) -> Traced:
    return binary(r, "Sub", a, b)


@converts("rsub", "__rsub__")
def _rsub(r: Recorder, a: Any, b: Any) -> Traced:
    return binary(r, "Sub", b, a)


@converts("mul", "__mul__", "__rmul__")
def mul(r: Recorder, a: Any, b: Any) -> Traced:
    return binary(r, "Mul", a, b)


def _quotient_dtype(a: Any, b: Any) -> torch.dtype:
    dtype = promoted(a, b)
    return torch.float32 if dtype in INTEGERS else dtype


@converts("div", "true_divide", "__truediv__")
def div(r: Recorder, a: Any, b: Any) -> Traced:
    return binary(r, "Div", a, b, _quotient_dtype(a, b))


@converts("__rtruediv__")
def _rdiv(r: Recorder, a: Any, b: Any) -> Traced:
    return div(r, b, a)


@converts("remainder", "__mod__")
def _mod(r: Recorder, a: Any, b: Any) -> Traced:
    return binary(r, "Mod", a, b)


@converts("floor_divide", "__floordiv__")
def _floordiv(r: Recorder, a: Any, b: Any) -> Traced:
    # ONNX rounds integer quotients towards zero, so the remainder is subtracted first and the division is exact.
    return binary(r, "Div", _sub(r, a, _mod(r, a, b)), b)


@converts("pow", "__pow__")
def power(r: Recorder, x: Traced, exponent: float) -> Traced:
    return emit(r, "Pow", [x, r.tensor(exponent, x.dtype)], Kind(x.dtype, x.shape))


@converts("minimum")
def _minimum(r: Recorder, a: Any, b: Any) -> Traced:
    return binary(r, "Min", a, b)


@converts("maximum")
def _maximum(r: Recorder, a: Any, b: Any) -> Traced:
    return binary(r, "Max", a, b)


@converts("clamp")
def _clamp(r: Recorder, x: Traced, min: float | None = None, max: float | None = None) -> Traced:
    if min is not None:
        x = binary(r, "Max", x, min, x.dtype)
    return x if max is None else binary(r, "Min", x, max, x.dtype)


@converts("neg", "__neg__")
def _neg(r: Recorder, x: Traced) -> Traced:
    return elementwise(r, "Neg", x)


@converts("square")
def _square(r: Recorder, x: Traced) -> Traced:
    return mul(r, x, x)


@converts("sqrt")
def _sqrt(r: Recorder, x: Traced) -> Traced:
    return elementwise(r, "Sqrt", x)


@converts("exp")
def _exp(r: Recorder, x: Traced) -> Traced:
    return elementwise(r, "Exp", x)


@converts("log")
def _log(r: Recorder, x: Traced) -> Traced:
    return elementwise(r, "Log", x)


@converts("nan_to_num")
def _nan_to_num(r: Recorder, x: Traced, nan: float = 0.0) -> Traced:
    known = _where(r, emit(r, "IsNaN", [x], Kind(torch.bool, x.shape)), nan, x)
    bounds = torch.finfo(x.dtype)
    return _clamp(r, known, bounds.min, bounds.max)


@converts("matmul", "__matmul__")
def matmul(r: Recorder, a: Any, b: Any) -> Traced:
    a, b = r.tensor(a), r.tensor(b)
    shape = (*broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    return emit(r, "MatMul", [a, b], Kind(a.dtype, shape))


def _compared(r: Recorder, op_type: str, a: Any, b: Any) -> Traced:
    pair, shape = operands(r, a, b, promoted(a, b))
    return emit(r, op_type, pair, Kind(torch.bool, shape))


@converts("eq", "__eq__")
def _eq(r: Recorder, a: Any, b: Any) -> Traced:
    return _compared(r, "Equal", a, b)


@converts("ne", "__ne__")
def _ne(r: Recorder, a: Any, b: Any) -> Traced:
    return _not(r, _eq(r, a, b))


@converts("lt", "__lt__")
def _lt(r: Recorder, a: Any, b: Any) -> Traced:
    return _compared(r, "Less", a, b)


@converts("le", "__le__")
def _le(r: Recorder, a: Any, b: Any) -> Traced:
    return _compared(r, "LessOrEqual", a, b)


@converts("gt", "__gt__")
def _gt(r: Recorder, a: Any, b: Any) -> Traced:
    return _compared(r, "Greater", a, b)


@converts("ge", "__ge__")
def _ge(r: Recorder, a: Any, b: Any) -> Traced:
    return _compared(r, "GreaterOrEqual", a, b)


@converts("logical_not", "__invert__")
def _not(r: Recorder, x: Traced) -> Traced:
    return elementwise(r, "Not", _logical(x))


@converts("logical_and", "__and__")
def _and(r: Recorder, a: Traced, b: Traced) -> Traced:
    return binary(r, "And", _logical(a), _logical(b))


@converts("logical_or", "__or__")
def _or(r: Recorder, a: Traced, b: Traced) -> Traced:
    return binary(r, "Or", _logical(a), _logical(b))


def _logical(x: Traced) -> Traced:
    if x.dtype != torch.bool:
        raise NotImplementedError("logic is on bool only")
    return x


@converts("where")
def _where(r: Recorder, condition: Traced, a: Any, b: Any) -> Traced:
    dtype = promoted(a, b)
    if dtype == torch.bool:
        return _or(r, _and(r, condition, a), _and(r, _not(r, condition), b))
    pair, shape = operands(r, a, b, dtype)
    return emit(r, "Where", [condition, *pair], Kind(dtype, broadcast(condition.shape, shape)))


@converts("masked_fill")
def _masked_fill(r: Recorder, x: Traced, mask: Traced, value: float) -> Traced:
    return _where(r, mask, r.tensor(value, x.dtype), x)
