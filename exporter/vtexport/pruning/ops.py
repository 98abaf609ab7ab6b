"""The PyTorch statement of the `vtexport` op domain: what every kernel and function body must compute.

Each op is registered with `torch.library` and has a fake kernel; under tracing to ONNX it becomes one node
of the same name, whose function body stands in `vtexport.graph.pruning_functions`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtexport.pruning.onnx_node import PRUNING, node, nodes
from vtexport.pruning.ranking import places_of


def token_score(
    query: Tensor, key: Tensor, rows: Tensor, places: Tensor, start: Tensor, count: int, scale: float
) -> Tensor:
    """Mean attention that some query rows pay to the visual tokens.

    Softmax over the keys that a row sees, mean over query heads and the rows that count, columns `start` …
    `start + count - 1`. Only the given rows are computed. Arithmetic is fp32 whatever the inputs are.

    Args:
        query: [B, H, R, D].
        key: [B, G, N, D], H a multiple of G (grouped keys).
        rows: [B, R] bool, which rows count; where none does, the scores are zero.
        places: [B, R] int64, the last key that a row sees (its own place under causality, N - 1 without).
        start: [B] int64, first visual column.
        count: V, number of visual columns.
        scale: factor on query · key.

    Returns:
        score [B, V] fp32.
    """
    if torch.compiler.is_exporting():
        attributes = {"count": count, "scale": scale}
        score = query.new_empty(query.shape[0], count, dtype=torch.float32)
        return node(PRUNING, "TokenScore", (query, key, rows, places, start), attributes, like=score)
    result: Tensor = torch.ops.vtexport.token_score(query, key, rows, places, start, count, scale)
    return result


def spread(score: Tensor) -> Tensor:
    """Over how many patches scores are spread: exp of their entropy, 1 (all on one) … V (all alike).

    Args:
        score: [B, V] fp32, positive.

    Returns:
        [B] fp32.
    """
    share = score / score.sum(dim=1, keepdim=True)
    # The smallest normal fp32 stands in for a share of zero, whose term is zero.
    return torch.exp(-(share * share.clamp(min=torch.finfo(torch.float32).tiny).log()).sum(dim=1))


def attention_rows(query: Tensor, key: Tensor, places: Tensor, scale: float) -> Tensor:
    """Softmaxed attention [B, H, R, N] fp32 of the given rows."""
    batch, heads, number, size = query.shape
    grouped = (query.float() * scale).reshape(batch, key.shape[1], -1, size)
    logits = (grouped @ key.float().transpose(2, 3)).reshape(batch, heads, number, key.shape[2])
    seen = torch.arange(key.shape[2], device=key.device) <= places[..., None]
    return torch.softmax(logits.masked_fill(~seen[:, None], -torch.inf), dim=-1)


def _columns(start: Tensor, count: int) -> Tensor:
    """The visual columns [B, V]."""
    return start[:, None] + torch.arange(count, device=start.device)


@torch.library.custom_op("vtexport::token_score", mutates_args=())
def _token_score(
    query: Tensor, key: Tensor, rows: Tensor, places: Tensor, start: Tensor, count: int, scale: float
) -> Tensor:
    attention = attention_rows(query, key, places, scale).mean(dim=1)
    share = rows.float() / rows.sum(dim=1, keepdim=True).clamp(min=1)
    score = (share[:, None] @ attention)[:, 0]
    return score.gather(1, _columns(start, count))


@_token_score.register_fake
def _(query: Tensor, key: Tensor, rows: Tensor, places: Tensor, start: Tensor, count: int, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], count, dtype=torch.float32)


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
    """`token_score` as sparsevlm-plus has it: attention divided, and only the heads that look at the image most.

    Args:
        query: [B, H, R, D].
        key: [B, G, N, D].
        rows: [B, R] bool.
        places: [B, R] int64.
        start: [B] int64.
        divisor: [B, R, V] fp32, what the attention of row and visual column is divided by.
        count: V.
        scale: factor on query · key.
        heads: how many heads are averaged: those whose sum over counting rows and visual columns is greatest,
            of equal sums the lower number.

    Returns:
        score [B, V] fp32.
    """
    inputs = (query, key, rows, places, start, divisor)
    if torch.compiler.is_exporting():
        attributes = {"count": count, "scale": scale, "heads": heads}
        score = query.new_empty(query.shape[0], count, dtype=torch.float32)
        return node(PRUNING, "TokenScoreHeads", inputs, attributes, like=score)
    result: Tensor = torch.ops.vtexport.token_score_heads(*inputs, count, scale, heads)
    return result


@torch.library.custom_op("vtexport::token_score_heads", mutates_args=())
def _token_score_heads(
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
    attention = attention_rows(query, key, places, scale)
    columns = _columns(start, count)[:, None, None].expand(-1, *attention.shape[1:3], -1)
    weighted = attention.gather(3, columns) / divisor[:, None]
    share = rows.float() / rows.sum(dim=1, keepdim=True).clamp(min=1)
    by_head = (share[:, None, None] @ weighted)[:, :, 0]
    total = by_head.sum(dim=2)
    chosen = _rank(total) < heads
    return (by_head * chosen[..., None]).sum(dim=1) / heads


@_token_score_heads.register_fake
def _(
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
    return query.new_empty(query.shape[0], count, dtype=torch.float32)


def _rank(score: Tensor) -> Tensor:
    """How many beat each entry of score [B, V], by value or at equal value by a lower index; NaN is beaten by all."""
    ranked = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    return torch.argsort(order, dim=1)


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
    index = places_of(_rank(score) < keep, keep)
    kept = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
    return kept, index.to(torch.int32)


@_token_select.register_fake
def _(hidden: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    kept = hidden.new_empty(hidden.shape[0], keep, hidden.shape[2])
    return kept, score.new_empty(score.shape[0], keep, dtype=torch.int32)


def token_recycle(
    hidden: Tensor, score: Tensor, keep: int, pool: int, clusters: int, paper: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge dropped tokens into a few: density-peak clustering of those of highest score (SparseVLM, section 3.3).

    The pool is the `pool` tokens that rank right behind the `keep` best. With d the Euclidean distance over √C,
    density = exp(-mean of the `clusters` smallest d², self included); delta = least d to a denser token, or the
    greatest d of all if none is denser; centres are the `clusters` tokens of greatest delta · density. Every token
    joins its nearest centre, a centre itself. Ties go to the lower index, in density too. Arithmetic is fp32.

    Args:
        hidden: [B, V, C].
        score: [B, V] fp32.
        keep: number of tokens that are not dropped.
        pool: m, 1 … V - keep.
        clusters: c, 1 … m.
        paper: False: join by distance and average, as the released code does. True: join by cosine similarity and
            sum, as the paper writes.

    Returns:
        merged [B, c, C], centres [B, c] int32 ascending, and for every token the number of the merged token that it
        joined or -1, [B, V] int32.
    """
    if torch.compiler.is_exporting():
        batch, number, width = hidden.shape
        merged = hidden.new_empty(batch, clusters, width)
        centres = score.new_empty(batch, clusters, dtype=torch.int32)
        cluster = score.new_empty(batch, number, dtype=torch.int32)
        attributes = {"keep": keep, "pool": pool, "clusters": clusters, "paper": int(paper)}
        merged, centres, cluster = nodes(
            PRUNING, "TokenRecycle", (hidden, score), attributes, like=(merged, centres, cluster)
        )
        return merged, centres, cluster
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.vtexport.token_recycle(hidden, score, keep, pool, clusters, paper)
    return result


@torch.library.custom_op("vtexport::token_recycle", mutates_args=())
def _token_recycle(
    hidden: Tensor, score: Tensor, keep: int, pool: int, clusters: int, paper: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, number, width = hidden.shape
    rank = _rank(score)
    index = places_of((rank >= keep) & (rank < keep + pool), pool)
    x = hidden.gather(1, index[..., None].expand(-1, -1, width)).float()
    # About their mean the products of the expansion lose fewer digits.
    centred = x - x.mean(dim=1, keepdim=True)
    norm = centred.square().sum(dim=2)
    product = centred @ centred.transpose(1, 2)
    # Two tokens that are each other's nearest tie in density: a matrix that is not symmetric to the bit would break the tie.
    squared = norm[:, :, None] + norm[:, None] - (product + product.transpose(1, 2))
    itself = torch.eye(pool, dtype=torch.bool, device=x.device)
    squared = (squared / width).clamp(min=0).masked_fill(itself, 0.0)
    # The density's logarithm orders as it does, and does not underflow where tokens lie far apart.
    density = -squared.topk(clusters, dim=2, largest=False).values.mean(dim=2)
    order = _rank(density)
    denser = order[:, None] < order[:, :, None]
    farthest = squared.amax(dim=(1, 2), keepdim=True)
    delta = torch.where(denser, squared, farthest).amin(dim=2)
    is_centre = _rank(0.5 * delta.log() + density) < clusters
    centre = places_of(is_centre, clusters)
    nearness = -squared
    if paper:
        unit = x / x.norm(dim=2, keepdim=True).clamp(min=1e-12)
        nearness = unit @ unit.transpose(1, 2)
    nearness = nearness.masked_fill(itself, torch.inf)
    to_centres = nearness.gather(2, centre[:, None].expand(-1, pool, -1))
    number_of = torch.arange(clusters, device=x.device)
    best = to_centres == to_centres.amax(dim=2, keepdim=True)
    joined = torch.where(best, number_of, clusters).amin(dim=2)
    members = (joined[:, None] == number_of[:, None]).float()
    merged = members @ x
    if not paper:
        merged = merged / members.sum(dim=2, keepdim=True)
    cluster = torch.full((batch, number), -1, dtype=torch.int64, device=x.device).scatter(1, index, joined)
    return merged.to(hidden.dtype), index.gather(1, centre).to(torch.int32), cluster.to(torch.int32)


@_token_recycle.register_fake
def _(hidden: Tensor, score: Tensor, keep: int, pool: int, clusters: int, paper: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, number, width = hidden.shape
    merged = hidden.new_empty(batch, clusters, width)
    centres = score.new_empty(batch, clusters, dtype=torch.int32)
    return merged, centres, score.new_empty(batch, number, dtype=torch.int32)
