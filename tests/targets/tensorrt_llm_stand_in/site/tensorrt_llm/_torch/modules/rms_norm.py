"""Normalisation by the root of the mean square."""

from __future__ import annotations

import torch
from torch import nn


class RMSNorm(nn.Module):
    """With a residual it adds first, and writes both results over its arguments, as the kernel does."""

    def __init__(
        self,
        *,
        hidden_size: int,
        eps: float,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        has_weights: bool = True,
        use_gemma: bool = False,
    ) -> None:
        super().__init__()
        weight = torch.ones(hidden_size, dtype=dtype, device=device)
        if has_weights:
            self.weight = nn.Parameter(weight, requires_grad=False)
        else:
            self.register_buffer("weight", weight, persistent=False)
        self.variance_epsilon = eps

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = ...
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`hidden_states` normalised; with `residual`, their sum normalised, and the sum."""
        added = isinstance(residual, torch.Tensor)
        total = hidden_states.float() + residual.float() if added else hidden_states.float()
        scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        normed = self.weight * (total * scale).to(hidden_states.dtype)
        if added:
            residual.copy_(total)
            normed = hidden_states.copy_(normed)
        return normed if residual is ... else (normed, residual)
