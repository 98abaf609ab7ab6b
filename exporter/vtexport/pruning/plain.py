"""The arithmetic of the pruning ops in PyTorch: what every kernel and function body must compute.

The contracts are in `vtexport.pruning.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtexport.pruning.choices import places_of


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


def _shares(places: Tensor) -> Tensor:
    """The share of each row in a mean over those that count, [B, R] fp32."""
    counted = (places >= 0).float()
    return counted / counted.sum(dim=1, keepdim=True).clamp(min=1)


def token_score(query: Tensor, key: Tensor, places: Tensor, start: Tensor, count: int, scale: float) -> Tensor:
    """`vtexport.pruning.ops.token_score`."""
    # A row that does not count sees the first key, so that its attention is a number.
    attention = attention_rows(query, key, places.clamp(min=0), scale).mean(dim=1)
    score = (_shares(places)[:, None] @ attention)[:, 0]
    return score.gather(1, _columns(start, count))


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
    """`vtexport.pruning.ops.token_score_heads`."""
    attention = attention_rows(query, key, places.clamp(min=0), scale)
    columns = _columns(start, count)[:, None, None].expand(-1, *attention.shape[1:3], -1)
    weighted = attention.gather(3, columns) / divisor[:, None]
    by_head = (_shares(places)[:, None, None] @ weighted)[:, :, 0]
    total = by_head.sum(dim=2)
    chosen = _rank(total) < heads
    return (by_head * chosen[..., None]).sum(dim=1) / heads


def _order(score: Tensor) -> Tensor:
    """The places of score [B, V] from the greatest down; of equal ones the lower place comes first, NaN last."""
    ranked = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return torch.sort(ranked, dim=1, descending=True, stable=True).indices


def _rank(score: Tensor) -> Tensor:
    """How many entries come before each entry of score [B, V] in `_order`."""
    return torch.argsort(_order(score), dim=1)


def token_select(hidden: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """`vtexport.pruning.ops.token_select`."""
    rank = _rank(score)
    index = places_of(rank < keep, keep)
    kept = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
    return kept, index.to(torch.int32), rank.to(torch.int32)


def token_recycle(
    hidden: Tensor, rank: Tensor, keep: int, pool: int, clusters: int, paper: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`vtexport.pruning.ops.token_recycle`."""
    batch, number, width = hidden.shape
    index = places_of((rank >= keep) & (rank < keep + pool), pool)
    x = hidden.gather(1, index[..., None].expand(-1, -1, width)).float()
    # Centred on their mean, the products in the expanded distance lose fewer digits.
    centred = x - x.mean(dim=1, keepdim=True)
    norm = centred.square().sum(dim=2)
    product = centred @ centred.transpose(1, 2)
    # Two tokens that are each other's nearest neighbours tie in density. A matrix that is not symmetric to the last bit
    # would break the tie.
    squared = norm[:, :, None] + norm[:, None] - (product + product.transpose(1, 2))
    itself = torch.eye(pool, dtype=torch.bool, device=x.device)
    squared = (squared / width).clamp(min=0).masked_fill(itself, 0.0)
    # This is the density's logarithm: it has the same order, and does not underflow if tokens lie far apart.
    density = -squared.topk(clusters, dim=2, largest=False).values.mean(dim=2)
    by_density = _rank(density)
    denser = by_density[:, None] < by_density[:, :, None]
    farthest = squared.amax(dim=(1, 2), keepdim=True)
    delta = torch.where(denser, squared, farthest).amin(dim=2)
    centre = _order(0.5 * delta.log() + density)[:, :clusters]
    nearness = -squared
    if paper:
        unit = x / x.norm(dim=2, keepdim=True).clamp(min=1e-12)
        nearness = unit @ unit.transpose(1, 2)
    nearness = nearness.masked_fill(nearness.isnan(), -torch.inf).masked_fill(itself, torch.inf)
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
