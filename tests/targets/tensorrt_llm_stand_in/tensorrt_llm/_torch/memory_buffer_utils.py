"""Buffers that several CUDA graphs share, by name."""

from __future__ import annotations

import math

import torch


class Buffers:
    """Every name has a list of buffers; whoever asks for a name gets one that is large enough, the same one again."""

    def __init__(self) -> None:
        self.buffers: dict[str, list[torch.Tensor]] = {}

    def get_buffer(
        self, tensor_shape: list[int], dtype: torch.dtype, buffer_name: str, reserve_buffer: bool
    ) -> torch.Tensor:
        """A view of the first buffer called `buffer_name` with room for the shape; a new buffer if there is none."""
        count = math.prod(tensor_shape)
        for buffer in self.buffers.setdefault(buffer_name, []):
            if buffer.dtype == dtype and buffer.numel() >= count:
                return buffer[:count].view(tuple(tensor_shape))
        buffer = torch.zeros(count, dtype=dtype)
        self.buffers[buffer_name].append(buffer)
        return buffer.view(tuple(tensor_shape))
