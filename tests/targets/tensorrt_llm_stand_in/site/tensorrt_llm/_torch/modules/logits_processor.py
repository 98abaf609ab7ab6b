"""Which rows become logits."""

from __future__ import annotations

import torch
from torch import nn

from ..attention_backend import AttentionMetadata
from .linear import Linear


class LogitsProcessor(nn.Module):
    """Logits of each sequence's last token."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        lm_head: Linear,
        attn_metadata: AttentionMetadata,
        return_context_logits: bool = False,
    ) -> torch.Tensor:
        """Logits in fp32, `[sequences, vocabulary]`; of every token with `return_context_logits`."""
        if not return_context_logits:
            if attn_metadata is None:
                hidden_states = hidden_states[-1].unsqueeze(0)
            else:
                hidden_states = hidden_states[torch.cumsum(attn_metadata.seq_lens_cuda, dim=0, dtype=torch.long) - 1]
        return lm_head(hidden_states).float()
