"""What the cache holds before a pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class KVCacheParams:
    """Cached tokens of each sequence."""

    use_cache: bool
    num_cached_tokens_per_seq: list[int] | None = None
    block_ids_per_seq: list[list] | None = None
    host_max_attention_window_sizes: torch.Tensor | None = None
    host_sink_token_length: torch.Tensor | None = None
    num_extra_kv_tokens: int | None = 0
