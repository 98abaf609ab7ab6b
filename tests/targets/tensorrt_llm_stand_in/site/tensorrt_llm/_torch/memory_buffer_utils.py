"""Buffers that several CUDA graphs share, by name."""

from __future__ import annotations

import math

import torch


class Buffers:
    """Every name has a list of buffers. Who reserves one gets the smallest with room, whoever else has it already."""

    def __init__(self) -> None:
        self.buffers: dict[str, list[torch.Tensor]] = {}

    def get_buffer(
        self, tensor_shape: list[int], dtype: torch.dtype, buffer_name: str, reserve_buffer: bool
    ) -> torch.Tensor:
        """A view of a buffer called `buffer_name`; of a new one if none has room, or if it is not to be reserved."""
        size = math.prod(tensor_shape) * dtype.itemsize
        known = self.buffers.setdefault(buffer_name, [])
        fitting = [buffer for buffer in known if buffer.numel() >= size] if reserve_buffer else []
        if not fitting:
            fitting = [torch.zeros(size, dtype=torch.uint8)]
            known += fitting
        buffer = min(fitting, key=torch.Tensor.numel)
        return buffer[:size].view(dtype).view(tuple(tensor_shape))
