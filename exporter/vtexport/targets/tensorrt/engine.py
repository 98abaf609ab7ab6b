"""Running TensorRT plans on a GPU, memory and stream by PyTorch.

Written against TensorRT's documented API; vtexport's own tests have no RTX GPU and never ran it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_rtx_bindings as trt
import torch

from vtexport.errors import TargetError
from vtexport.targets.base import Array, Cache, PrefillInput, PrefillOutput, VisionOutput, prefill_names, vision_feeds
from vtexport.targets.tensorrt.builder import _logger

_DTYPES = {
    trt.float32: torch.float32,
    trt.float16: torch.float16,
    trt.int32: torch.int32,
    trt.int64: torch.int64,
}


@dataclass
class CudaCache:
    """Two sets of buffers [B, G, capacity, D]: a step reads one and writes the other."""

    front: dict[str, Any]
    back: dict[str, Any]
    image_position: Array | None = None
    ranking: Array | None = None

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.front.values())


class _Graph:
    """A deserialized plan with its execution context."""

    def __init__(self, path: Path) -> None:
        runtime = trt.Runtime(_logger())
        self.engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            reason = _logger().errors[-1] if _logger().errors else "no reason given"
            raise TargetError(f"TensorRT cannot load {path} ({reason}); build it for this GPU with --sm")
        self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.outputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run on the current stream; outputs not given are allocated."""
        for name, tensor in inputs.items():
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        results = dict(outputs or {})
        for name in self.outputs:
            if name not in results:
                shape = tuple(self.context.get_tensor_shape(name))
                kind = _DTYPES[self.engine.get_tensor_dtype(name)]
                results[name] = torch.empty(shape, dtype=kind, device="cuda")
            self.context.set_tensor_address(name, results[name].data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise TargetError("TensorRT failed to run the engine; build it for this GPU with --sm")
        return results


class TensorRTEngine:
    """The plans of a bundle on the current GPU."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths
        self._graphs: dict[str, _Graph] = {}

    def load(self) -> None:
        for name in self._paths:
            self._graph(name)

    def _graph(self, name: str) -> _Graph:
        if name not in self._graphs:
            self._graphs[name] = _Graph(self._paths[name])
        return self._graphs[name]

    def vision(self, pixels: Array, question_ids: Array | None = None) -> VisionOutput:
        feeds = vision_feeds(pixels, question_ids)
        found = self._graph("vision").run({name: torch.from_numpy(array).cuda() for name, array in feeds.items()})
        return VisionOutput({name: tensor.cpu().numpy() for name, tensor in found.items()})

    def prefill(self, inputs: PrefillInput, new_tokens: int, bucket: int = 0) -> PrefillOutput:
        graph = self._graph(prefill_names(len(self._paths) - 2)[bucket])
        found = graph.run({n: torch.from_numpy(a).cuda() for n, a in inputs.feeds().items()})
        front, back, stages = {}, {}, {}
        for name, tensor in found.items():
            if not name.startswith("present."):
                stages[name] = tensor.cpu().numpy()
                continue
            batch, groups, tokens, size = tensor.shape
            room = torch.zeros((batch, groups, tokens + new_tokens, size), dtype=tensor.dtype, device="cuda")
            room[:, :, :tokens] = tensor
            front[name], back[name] = room, torch.empty_like(room)
        logits = stages.pop("logits")
        return PrefillOutput(
            logits, CudaCache(front, back, inputs.image_position if "ranking" in stages else None), stages
        )

    def decode(self, cache: Cache, tokens: Array, length: Array, position: Array) -> Array:
        assert isinstance(cache, CudaCache)
        arrays = {"input_ids": tokens[:, None], "length": length, "position": position}
        if cache.image_position is not None:
            arrays["image_position"] = cache.image_position
        inputs = {n: torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)).cuda() for n, a in arrays.items()}
        inputs |= {name.replace("present", "past"): buffer for name, buffer in cache.front.items()}
        found = self._graph("decode").run(inputs, cache.back)
        logits: Array = found["logits"].cpu().numpy()
        if "ranking" in found:
            cache.ranking = found["ranking"].cpu().numpy()
        cache.front, cache.back = cache.back, cache.front
        return logits
