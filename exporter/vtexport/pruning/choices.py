"""Choices that break ties by index, in operations that every runtime computes alike.

Runtimes promise no order of equal values in sorting, TopK or ArgMax, so only distinct numbers are sorted here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def order(score: Tensor) -> Tensor:
    """The places of score [B, V] from the greatest down, [B, V] int64; of equal scores the lower place comes first."""
    import torch

    place = torch.arange(score.shape[1], device=score.device)
    mine, other = score[:, :, None], score[:, None]
    beaten = (other > mine) | ((other == mine) & (place[None] < place[:, None]))
    rank = beaten.float().sum(dim=2)
    return torch.topk(-rank, score.shape[1], dim=1).indices


def first_best(value: Tensor) -> Tensor:
    """The place of the greatest value along the last axis of [..., V], the lowest if there are several: [...] int64."""
    import torch

    number = value.shape[-1]
    place = torch.arange(number, device=value.device).float()
    best = value == value.amax(dim=-1, keepdim=True)
    return torch.where(best, place, float(number)).amin(dim=-1).long()


def places_of(chosen: Tensor, number: int) -> Tensor:
    """The places of the `number` true entries in every row of chosen [B, V], ascending: [B, number] int64."""
    import torch

    total = chosen.shape[1]
    place = torch.arange(total, device=chosen.device).float()
    return torch.topk(-(place + total * (~chosen).float()), number, dim=1).indices


def marked(index: Tensor, total: int) -> Tensor:
    """Which of `total` places index [B, n] names, [B, total] bool."""
    import torch

    place = torch.arange(total, device=index.device)
    # A sum, because TensorRT has no `any`.
    return (index[:, :, None] == place).float().sum(dim=1) > 0


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, V, C] at index [B, n]: [B, n, C]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of the rows of a [B, n, C] and b [B, m, C], in fp32: [B, n, m]."""
    wide = (x.float() for x in (a, b))
    left, right = (x / x.square().sum(dim=2, keepdim=True).sqrt().clamp(min=1e-12) for x in wide)
    return left @ right.transpose(1, 2)
