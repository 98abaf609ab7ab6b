"""What a decoder layer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from ..attention_backend import AttentionMetadata


class DecoderLayer(nn.Module, ABC):
    """A layer of a decoder."""

    @abstractmethod
    def forward(
        self,
        position_ids: torch.IntTensor,
        hidden_states: torch.Tensor,
        attn_metadata: AttentionMetadata,
        residual: torch.Tensor | None = ...,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Hidden states, with the residual if one is given."""

    def skip_forward(
        self,
        position_ids: torch.IntTensor,
        hidden_states: torch.Tensor,
        attn_metadata: AttentionMetadata,
        residual: torch.Tensor | None = ...,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What a layer does on a GPU that lacks it: nothing."""
        return hidden_states if residual is ... else (hidden_states, residual)
