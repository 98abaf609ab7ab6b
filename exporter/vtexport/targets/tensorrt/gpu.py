"""The GPU as the engine uses it: memory, a stream of its own, events and captured graphs, all from PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vtexport.arrays import Array
from vtexport.errors import TargetError


class Gpu:
    """The current GPU. Every method but `working` is called inside `with gpu.working():`."""

    def __init__(self) -> None:
        # TensorRT synchronises the whole device if it is given the default stream.
        self.stream = torch.cuda.Stream()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Work on this engine's stream; running out of memory is an error that says what to do."""
        try:
            with torch.cuda.stream(self.stream):
                yield
        except torch.cuda.OutOfMemoryError as error:
            raise TargetError(
                "the GPU is out of memory; ask with fewer prompts at a time, or build again with a smaller --max-batch "
                "or --max-text"
            ) from error

    @property
    def handle(self) -> int:
        """The stream as TensorRT takes it."""
        return int(self.stream.cuda_stream)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Any:
        return torch.empty(tuple(shape), dtype=dtype, device="cuda")

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Any:
        return torch.zeros(tuple(shape), dtype=dtype, device="cuda")

    def put(self, array: Array) -> Any:
        """`array` as a tensor on the GPU."""
        return torch.from_numpy(np.ascontiguousarray(array)).to("cuda")

    def write(self, array: Array, place: Any) -> None:
        """Copy `array` into the tensor `place`, with no other tensor between."""
        place.copy_(torch.from_numpy(np.ascontiguousarray(array)))

    def fetch(self, tensor: Any) -> Array:
        """`tensor` as an array, once all work before has ended."""
        array: Array = tensor.cpu().numpy()
        return array

    def free_unused(self) -> None:
        """Give memory back that PyTorch holds for later."""
        torch.cuda.empty_cache()

    def event(self) -> Any:
        """An event that knows when it was recorded."""
        return torch.cuda.Event(enable_timing=True)

    def captured(self, call: Callable[[], None]) -> Callable[[], None] | None:
        """What repeats the kernels that `call` launches; None if they cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        self.stream.synchronize()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                call()
        except (RuntimeError, TargetError):
            self.stream.synchronize()
            return None
        return graph.replay


@dataclass(frozen=True)
class OnGpu:
    """A tensor on the GPU as an engine's output; it becomes an array where it is used as one."""

    gpu: Gpu
    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> OnGpu:
        with self.gpu.working():
            return OnGpu(self.gpu, self.tensor[torch.from_numpy(key) if isinstance(key, np.ndarray) else key])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        with self.gpu.working():
            return self.gpu.fetch(self.tensor).astype(dtype, copy=False)
