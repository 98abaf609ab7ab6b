"""The ops of the domain `vtexport`: the contract of every kernel and function body.

The arithmetic is in `vtexport.pruning.plain`. Each op is registered with `torch.library` and has a fake kernel, so
that `torch.compile` and `torch.export` go through it; tensors on a GPU go to the CUDA kernels where this installation
has them. Each follows torch's `__torch_function__` protocol, by which tracing turns it into one ONNX node of the same
name (`vtexport.graph.tracing.own_ops`). The node's function body is in `vtexport.graph.pruning_functions`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef  # type: ignore[attr-defined]  # imported there, but not in its __all__
from torch.overrides import handle_torch_function, has_torch_function

from vtexport.native import kernels as native
from vtexport.pruning import plain


def _registered(name: str) -> CustomOpDef:
    """Op `name`: PyTorch's arithmetic, and on a GPU the native kernel."""
    arithmetic: Callable[..., Any] = getattr(plain, name)
    op = torch.library.custom_op(f"vtexport::{name}", arithmetic, mutates_args=())
    if native.available("cuda"):
        kernel: Callable[..., Any] = getattr(native, name)

        # Element types that kernels do not take, and GPUs that they were not compiled for, stay with PyTorch.
        @op.register_kernel("cuda")
        def _(first: Tensor, *others: Any) -> Any:
            taken = first.dtype in native.DTYPES and native.runs_on(torch.cuda.get_device_capability(first.device))
            return (kernel if taken else arithmetic)(first, *others)

    return op


def token_score(query: Tensor, key: Tensor, places: Tensor, start: Tensor, count: int, scale: float) -> Tensor:
    """Mean attention that some query rows pay to the visual tokens.

    Softmax over the keys that a row sees, mean over query heads and the rows that count, columns `start` …
    `start + count - 1`. Only the given rows are computed. Arithmetic is fp32 whatever the inputs are.

    Args:
        query: [B, H, R, D].
        key: [B, G, N, D], H a multiple of G (grouped keys).
        places: [B, R] int64, the last key that a row sees (its own place under causality, N - 1 without). A row with a
            negative place does not count; if none does, the scores are zero.
        start: [B] int64, first visual column.
        count: V, number of visual columns.
        scale: factor on query · key.

    Returns:
        score [B, V] fp32.
    """
    inputs = (query, key, places, start)
    if has_torch_function(inputs):
        return handle_torch_function(token_score, inputs, *inputs, count=count, scale=scale)
    result: Tensor = torch.ops.vtexport.token_score(*inputs, count, scale)
    return result


def spread(score: Tensor) -> Tensor:
    """The spread of scores: the exponential of their entropy, from 1 (all on one patch) to V (all alike).

    Args:
        score: [B, V] fp32, positive.

    Returns:
        [B] fp32.
    """
    share = score / score.sum(dim=1, keepdim=True)
    # A share of zero is clamped to the smallest normal fp32 in the logarithm; its term stays zero.
    return torch.exp(-(share * share.clamp(min=torch.finfo(torch.float32).tiny).log()).sum(dim=1))


@_registered("token_score").register_fake
def _(query: Tensor, key: Tensor, places: Tensor, start: Tensor, count: int, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], count, dtype=torch.float32)


def token_score_heads(
    query: Tensor,
    key: Tensor,
    places: Tensor,
    start: Tensor,
    divisor: Tensor,
    count: int,
    scale: float,
    heads: int,
) -> Tensor:
    """`token_score` for sparsevlm-plus: attention is divided, and only the heads that attend to the image most count.

    Args:
        query: [B, H, R, D].
        key: [B, G, N, D].
        places: [B, R] int64.
        start: [B] int64.
        divisor: [B, R, V] fp32, by which the attention of each row to each visual column is divided.
        count: V.
        scale: factor on query · key.
        heads: how many heads are averaged: those whose sum over counting rows and visual columns is greatest; of
            equal sums, the head of lower number.

    Returns:
        score [B, V] fp32.
    """
    inputs = (query, key, places, start, divisor)
    if has_torch_function(inputs):
        return handle_torch_function(token_score_heads, inputs, *inputs, count=count, scale=scale, heads=heads)
    result: Tensor = torch.ops.vtexport.token_score_heads(*inputs, count, scale, heads)
    return result


@_registered("token_score_heads").register_fake
def _(
    query: Tensor,
    key: Tensor,
    places: Tensor,
    start: Tensor,
    divisor: Tensor,
    count: int,
    scale: float,
    heads: int,
) -> Tensor:
    return query.new_empty(query.shape[0], count, dtype=torch.float32)


def token_select(hidden: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `keep` tokens of highest score, in their original order.

    Of equal scores the lower index wins; NaN ranks below every number.

    Args:
        hidden: [B, V, C].
        score: [B, V] fp32.
        keep: K, 1 … V.

    Returns:
        kept [B, K, C]; index [B, K] int32, ascending; and for every token its rank, 0 for the highest score,
        [B, V] int32.
    """
    if has_torch_function((hidden, score)):
        return handle_torch_function(token_select, (hidden, score), hidden, score, keep)
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.vtexport.token_select(hidden, score, keep)
    return result


@_registered("token_select").register_fake
def _(hidden: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    kept = hidden.new_empty(hidden.shape[0], keep, hidden.shape[2])
    index, rank = (score.new_empty(score.shape[0], number, dtype=torch.int32) for number in (keep, score.shape[1]))
    return kept, index, rank


def token_recycle(
    hidden: Tensor, rank: Tensor, keep: int, pool: int, clusters: int, paper: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge dropped tokens into a few: density-peak clustering of those of highest score (SparseVLM, section 3.3).

    The pool is the `pool` tokens that rank right behind the `keep` best. With d the Euclidean distance over √C,
    density = exp(-mean of the `clusters` smallest d², self included); delta = least d to a denser token, or the
    greatest d of all if none is denser; centres are the `clusters` tokens of greatest delta · density, and merged tokens
    stand in the order of their centres' delta · density, falling, as in the released code. Every token joins its nearest
    centre, of equally near ones the first in that order, and a centre joins itself. Other ties go to the lower index, in
    density too. Arithmetic is fp32.
    If a row of the batch holds NaN or infinity, it is undefined which of its tokens merge, but indices stay in range
    and other rows are not affected.

    Args:
        hidden: [B, V, C].
        rank: [B, V] int32, the ranks of all tokens, by `token_select`.
        keep: number of tokens that are not dropped.
        pool: m, 1 … V - keep.
        clusters: c, 1 … m.
        paper: False: join by distance and average, as the released code does. True: join by cosine similarity and
            sum, as the paper writes.

    Returns:
        merged [B, c, C]; their centres [B, c] int32; and for every token the number of the merged token that it joined,
        or -1, [B, V] int32.
    """
    if has_torch_function((hidden, rank)):
        return handle_torch_function(token_recycle, (hidden, rank), hidden, rank, keep, pool, clusters, paper)
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.vtexport.token_recycle(hidden, rank, keep, pool, clusters, paper)
    return result


@_registered("token_recycle").register_fake
def _(hidden: Tensor, rank: Tensor, keep: int, pool: int, clusters: int, paper: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, number, width = hidden.shape
    merged = hidden.new_empty(batch, clusters, width)
    return merged, rank.new_empty(batch, clusters), rank.new_empty(batch, number)
