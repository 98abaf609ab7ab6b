"""The PyTorch statement of the `vtexport` op domain: what every kernel and function body must compute.

Each op is registered with `torch.library` and has a fake kernel; under tracing to ONNX it becomes one node
of the same name, whose function body stands in `vtexport.graph.functions`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtexport.pruning.onnx_node import PRUNING, node, nodes


def token_score(query: Tensor, key: Tensor, start: int, count: int, scale: float) -> Tensor:
    """Mean attention that some query rows pay to the visual tokens.

    Softmax over all keys, mean over query heads and rows, columns `start` … `start + count - 1`.
    Only the given rows are computed. Arithmetic is fp32 whatever the inputs are.

    Args:
        query: [B, H, R, D].
        key: [B, G, N, D], H a multiple of G (grouped keys).
        start: first visual column.
        count: V, number of visual columns.
        scale: factor on query · key.

    Returns:
        score [B, V] fp32.
    """
    if torch.compiler.is_exporting():
        attributes = {"start": start, "count": count, "scale": scale}
        score = query.new_empty(query.shape[0], count, dtype=torch.float32)
        return node(PRUNING, "TokenScore", (query, key), attributes, like=score)
    result: Tensor = torch.ops.vtexport.token_score(query, key, start, count, scale)
    return result


@torch.library.custom_op("vtexport::token_score", mutates_args=())
def _token_score(query: Tensor, key: Tensor, start: int, count: int, scale: float) -> Tensor:
    grouped = (query.float() * scale).reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    attention = torch.softmax(grouped @ key.float().transpose(2, 3), dim=-1)
    return attention.mean(dim=(1, 2))[:, start : start + count].contiguous()


@_token_score.register_fake
def _(query: Tensor, key: Tensor, start: int, count: int, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], count, dtype=torch.float32)


def token_select(hidden: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` tokens of highest score, in their original order.

    Of equal scores the lower index wins; NaN ranks below every number.

    Args:
        hidden: [B, V, C].
        score: [B, V] fp32.
        keep: K, 1 … V.

    Returns:
        kept [B, K, C] and index [B, K] int32, ascending.
    """
    if torch.compiler.is_exporting():
        kept = hidden.new_empty(hidden.shape[0], keep, hidden.shape[2])
        index = score.new_empty(score.shape[0], keep, dtype=torch.int32)
        kept, index = nodes(PRUNING, "TokenSelect", (hidden, score), {"keep": keep}, like=(kept, index))
        return kept, index
    result: tuple[Tensor, Tensor] = torch.ops.vtexport.token_select(hidden, score, keep)
    return result


@torch.library.custom_op("vtexport::token_select", mutates_args=())
def _token_select(hidden: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    ranked = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    index = order[:, :keep].sort(dim=1).values
    kept = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
    return kept, index.to(torch.int32)


@_token_select.register_fake
def _(hidden: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    kept = hidden.new_empty(hidden.shape[0], keep, hidden.shape[2])
    return kept, score.new_empty(score.shape[0], keep, dtype=torch.int32)
