"""Rotation outside of attention."""

from __future__ import annotations

import torch
from torch import nn

from ..attention_backend.rope import RopeParams, rotate


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by positions that it is given."""

    def __init__(self, rope_params: RopeParams, *, head_dim: int, is_neox: bool = True) -> None:
        super().__init__()
        if not is_neox or rope_params.dim != head_dim:
            raise NotImplementedError("the stand-in rotates whole heads, by halves")
        self.head_dim, self.frequencies = head_dim, rope_params.frequencies()

    def forward(self, position_ids: torch.Tensor, targets: list[torch.Tensor]) -> list[torch.Tensor]:
        """Rotate every one of `targets`, `[tokens, heads * head_dim]`, in place, as FlashInfer's kernel does."""
        positions = position_ids.reshape(-1)
        for target in targets:
            heads = target.unflatten(-1, (-1, self.head_dim))
            target.copy_(rotate(heads, positions, self.frequencies).flatten(1))
        return targets
