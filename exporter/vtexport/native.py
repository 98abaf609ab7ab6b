"""The native kernels of `plugins/`, where they were built: the CPU twins of the ops in `vtexport.pruning.ops`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vtexport.errors import TargetError

_native: Any
try:
    _native = import_module("vtexport._native")
except ImportError:  # installed where no C++ compiler was
    _native = None


def available() -> bool:
    """Whether this installation has native kernels."""
    return _native is not None


def token_score(
    query: Tensor, key: Tensor, rows: Tensor, places: Tensor, start: Tensor, count: int, scale: float
) -> Tensor:
    """`vtexport.pruning.ops.token_score` by the CPU twin; dtypes fp32, fp16, bf16."""
    return _score((query, key, rows, places, start), None, count, scale, 0)


def token_score_heads(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    places: Tensor,
    start: Tensor,
    divisor: Tensor,
    count: int,
    scale: float,
    heads: int,
) -> Tensor:
    """`vtexport.pruning.ops.token_score_heads` by the CPU twin; dtypes fp32, fp16, bf16."""
    return _score((query, key, rows, places, start), divisor.contiguous(), count, scale, heads)


def token_select(hidden: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """`vtexport.pruning.ops.token_select` by the CPU twin; dtypes fp32, fp16, bf16."""
    batch, _, width = hidden.shape
    kept = hidden.new_empty(batch, max(keep, 0), width)
    index = torch.empty(batch, max(keep, 0), dtype=torch.int32)
    _module().token_select(hidden.contiguous(), score.contiguous(), kept, index)
    return kept, index


def token_recycle(
    hidden: Tensor, score: Tensor, keep: int, pool: int, clusters: int, paper: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`vtexport.pruning.ops.token_recycle` by the CPU twin; dtypes fp32, fp16, bf16."""
    batch, tokens, width = hidden.shape
    merged = hidden.new_empty(batch, max(clusters, 0), width)
    centres = torch.empty(batch, max(clusters, 0), dtype=torch.int32)
    cluster = torch.empty(batch, tokens, dtype=torch.int32)
    _module().token_recycle(hidden.contiguous(), score.contiguous(), keep, pool, paper, merged, centres, cluster)
    return merged, centres, cluster


def _score(arrays: tuple[Tensor, ...], divisor: Tensor | None, count: int, scale: float, heads: int) -> Tensor:
    score = torch.empty(arrays[0].shape[0], count)
    _module().token_score(*(array.contiguous() for array in arrays), divisor, scale, heads, score)
    return score


def _module() -> Any:
    if _native is None:
        raise TargetError(
            "the native kernels were not built; install a C++ compiler and then vtexport again, from its source"
        )
    return _native
