"""What goes with a request beside its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class MultimodalInput:
    """Where in a prompt its images are, and their hashes."""

    multimodal_hashes: list[list[int]]
    multimodal_positions: list[int]
    multimodal_lengths: list[int]


@dataclass
class MultimodalRuntimeData:
    """Which of a prompt's visual tokens this pass computes. Made only for requests that have hashes."""

    past_seen_token_num: int
    mm_token_lengths: list[int]
    mm_token_positions: list[int]
    chunk_end_pos: int
    special_token_offsets: list[int]
    num_unseen_mm_tokens: int | None = None
    num_mm_tokens_in_chunk: int | None = None
    total_mm_tokens_in_request: int | None = None
    num_unseen_special_tokens: int | None = 0
    num_special_tokens_in_chunk: int | None = 0
    total_special_tokens_in_request: int | None = 0

    def __post_init__(self) -> None:
        """Count the visual tokens before this pass and in it."""
        spans = [(at, at + length) for at, length in zip(self.mm_token_positions, self.mm_token_lengths, strict=True)]
        self.total_mm_tokens_in_request = sum(self.mm_token_lengths)
        begin, end = self.past_seen_token_num, self.chunk_end_pos
        self.num_unseen_mm_tokens = sum(max(0, min(stop, begin) - start) for start, stop in spans)
        self.num_mm_tokens_in_chunk = sum(max(0, min(stop, end) - max(start, begin)) for start, stop in spans)


@dataclass
class MultimodalParams:
    """A request's images, embeddings and positions of them."""

    multimodal_input: MultimodalInput | None = None
    multimodal_data: dict[str, Any] | None = field(default_factory=dict)
    multimodal_runtime: MultimodalRuntimeData | None = None

    def __post_init__(self) -> None:
        """None means empty."""
        if self.multimodal_data is None:
            self.multimodal_data = {}

    def has_content(self) -> bool:
        """Whether there is anything."""
        return bool(self.multimodal_input or self.multimodal_data)

    def to_device(
        self, element: str, device: str, pin_memory: bool = False, target_keywords: list[str] | None = None
    ) -> None:
        """Move tensors of `element`, of `target_keywords` (paths with dots) alone if given; there is one device here.

        With paths the dictionary stays the caller's own and its entries change; without, a new one takes its place.
        """
        if element != "multimodal_data":
            raise ValueError(f"{element} cannot be moved")
        if target_keywords is None:
            self.multimodal_data = _copied(self.multimodal_data)
            return
        for path in target_keywords:
            *parents, last = path.split(".")
            at: Any = self.multimodal_data
            for key in parents:
                at = at.get(key) if isinstance(at, dict) else None
            if isinstance(at, dict) and last in at:
                at[last] = _copied(at[last])

    def strip_for_generation(self) -> None:
        """Keep what generation needs: nothing but the offsets of three-part positions."""
        offsets = (self.multimodal_data or {}).get("mrope_config", {}).get("mrope_position_deltas")
        self.multimodal_data = {} if offsets is None else {"mrope_config": {"mrope_position_deltas": offsets}}


def _copied(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _copied(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_copied(value) for value in data]
    # Another device's memory: a copy.
    return data.clone() if isinstance(data, torch.Tensor) else data
