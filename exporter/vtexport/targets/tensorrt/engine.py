"""Runs TensorRT plans on a GPU, with memory and streams from PyTorch.

Written against TensorRT's documented API; vtexport's own tests have had no GPU and have never run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtexport.arrays import Array
from vtexport.errors import TargetError
from vtexport.targets.base import (
    Cache,
    LayerTimes,
    PrefillInput,
    PrefillOutput,
    VisionInput,
    VisionOutput,
    prefill_name,
)
from vtexport.targets.tensorrt.bindings import Bindings

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
}


@dataclass(frozen=True)
class Opening:
    """How plans were built: `stripped` of their weights, with `host_code` for later versions."""

    stripped: bool = False
    host_code: bool = False


@dataclass
class CudaCache:
    """Two sets of buffers [B, G, capacity, D]: a step reads one and writes the other.

    From the third step on, each direction is captured as a CUDA graph and replayed, unless TensorRT does something that
    cannot be captured. A step's other inputs lie in `inputs`, whose addresses therefore do not change.
    """

    front: dict[str, Any]
    back: dict[str, Any]
    inputs: dict[str, Any]
    ranking: Array | None = None
    steps: int = 0
    capturable: bool = True
    outputs: list[dict[str, Any]] = field(default_factory=lambda: [{}, {}])
    graphs: list[Any] = field(default_factory=lambda: [None, None])

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.front.values())


class _Graph:
    """A deserialized plan with its execution context."""

    def __init__(self, bindings: Bindings, path: Path, opening: Opening) -> None:
        trt = bindings.trt
        bindings.logger.begin()
        runtime = trt.Runtime(bindings.logger)
        runtime.engine_host_code_allowed = opening.host_code
        self.engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise TargetError(
                f"TensorRT cannot load {path} ({bindings.first_error}); build the bundle again on this GPU"
            )
        if opening.stripped:
            _refit(bindings, self.engine, path.with_suffix(".onnx"))
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise TargetError(f"TensorRT has no memory to run {path} ({bindings.first_error}); free some on this GPU")
        self._kinds = {}
        self.outputs = []
        for number in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(number)
            self._kinds[name] = _DTYPES[self.engine.get_tensor_dtype(name).name]
            if self.engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
                self.outputs.append(name)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run on the current stream; outputs not given are allocated."""
        for name, tensor in inputs.items():
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        results = dict(outputs or {})
        for name in self.outputs:
            if name not in results:
                shape = tuple(self.context.get_tensor_shape(name))
                results[name] = torch.empty(shape, dtype=self._kinds[name], device="cuda")
            self.context.set_tensor_address(name, results[name].data_ptr())
        self.timed(self.enqueue)
        return results

    def kind(self, name: str) -> Any:
        """The torch dtype of an input or output."""
        return self._kinds[name]

    def enqueue(self) -> None:
        """Run once more, on the shapes and addresses set last."""
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise TargetError("TensorRT failed to run the engine; build the bundle again on this GPU")

    def timed(self, call: Callable[[], None]) -> None:
        """Run `call` between two events on the current stream."""
        self._start.record()
        call()
        self._end.record()

    @property
    def milliseconds(self) -> float:
        """Time of the last call on the GPU; waits for the call to end."""
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end))


def _refit(bindings: Bindings, engine: Any, source: Path) -> None:
    """Put the weights of the ONNX file `source` into an engine that was built without them."""
    trt = bindings.trt
    refitter = trt.Refitter(engine, bindings.logger)
    parser = trt.OnnxParserRefitter(refitter, bindings.logger)
    if not parser.refit_from_file(str(source)) or not refitter.refit_cuda_engine():
        raise TargetError(f"TensorRT cannot put the weights of {source} back ({bindings.first_error}); build again")


class TensorRTEngine:
    """The plans of a bundle on the current GPU."""

    def __init__(self, bindings: Bindings, paths: Mapping[str, Path], opening: Opening) -> None:
        self._bindings, self._paths, self._how = bindings, paths, opening
        self._graphs: dict[str, _Graph] = {}
        self._profiling = False
        self._ran: set[str] = set()

    def load(self) -> None:
        for name in self._paths:
            self._graph(name)

    def _graph(self, name: str) -> _Graph:
        if name not in self._graphs:
            self._graphs[name] = _Graph(self._bindings, self._paths[name], self._how)
        self._ran.add(name)
        return self._graphs[name]

    def device_times(self) -> dict[str, float]:
        return {name: self._graphs[name].milliseconds for name in self._ran if name in self._graphs}

    def vision(self, inputs: VisionInput) -> VisionOutput:
        outputs = self._graph("vision").run(on_gpu(inputs.feeds()))
        return VisionOutput({name: tensor.cpu().numpy() for name, tensor in outputs.items()})

    def prefill(self, inputs: PrefillInput, new_tokens: int, bucket: int = 0) -> PrefillOutput:
        graph = self._graph(prefill_name(self._paths, bucket))
        outputs = graph.run(on_gpu(inputs.feeds()))
        front, back, stages = {}, {}, {}
        for name, tensor in outputs.items():
            if not name.startswith("present."):
                stages[name] = tensor.cpu().numpy()
                continue
            batch, groups, tokens, size = tensor.shape
            room = torch.zeros((batch, groups, tokens + new_tokens, size), dtype=tensor.dtype, device="cuda")
            room[:, :, :tokens] = tensor
            front[name], back[name] = room, torch.empty_like(room)
        logits = stages.pop("logits")
        layers, rows = len(front) // 2, len(logits)
        shapes = {"input_ids": (rows, 1), "length": (layers, rows), "position": (layers, rows)}
        fixed = {name: torch.zeros(shape, dtype=torch.int64, device="cuda") for name, shape in shapes.items()}
        if "ranking" in stages:
            fixed |= on_gpu({"image_position": inputs.image_position})
        return PrefillOutput(logits, CudaCache(front, back, fixed), stages)

    def decode(self, cache: Cache, tokens: Array, length: Array, position: Array) -> Array:
        assert isinstance(cache, CudaCache)
        for name, array in {"input_ids": tokens[:, None], "length": length, "position": position}.items():
            cache.inputs[name].copy_(torch.from_numpy(np.array(array, dtype=np.int64)))
        graph, direction = self._graph("decode"), cache.steps % 2
        replay = cache.graphs[direction]
        if replay is not None and not self._profiling:
            graph.timed(replay.replay)
        else:
            past = {name.replace("present", "past"): buffer for name, buffer in cache.front.items()}
            known = {**cache.outputs[direction], **cache.back}
            cache.outputs[direction] = graph.run({**cache.inputs, **past}, known)
            # TensorRT must have run once in this shape before it can be captured.
            if cache.steps >= 2 and cache.capturable and not self._profiling:
                cache.graphs[direction] = _captured(graph)
                cache.capturable = cache.graphs[direction] is not None
        outputs = cache.outputs[direction]
        logits: Array = outputs["logits"].cpu().numpy()
        if "ranking" in outputs:
            cache.ranking = outputs["ranking"].cpu().numpy()
        cache.front, cache.back = cache.back, cache.front
        cache.steps += 1
        return logits

    def layer_times(self, call: Callable[[], None]) -> LayerTimes:
        times: dict[str, dict[str, float]] = {}
        self.load()
        with self._profilers(times):
            call()
        return times

    @contextmanager
    def _profilers(self, times: dict[str, dict[str, float]]) -> Iterator[None]:
        trt = self._bindings.trt

        class Profiler(trt.IProfiler):  # type: ignore[misc,name-defined]
            def __init__(self, layers: dict[str, float]) -> None:
                trt.IProfiler.__init__(self)
                self.layers = layers

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                self.layers[layer_name] = self.layers.get(layer_name, 0.0) + ms

        # Contexts do not own their profilers.
        profilers = {name: Profiler(times.setdefault(name, {})) for name in self._graphs}
        for name, graph in self._graphs.items():
            graph.context.profiler = profilers[name]
        self._profiling = True
        try:
            yield
        finally:
            self._profiling = False
            # A profiler cannot be removed from a context; a new context has none.
            for graph in self._graphs.values():
                graph.context = graph.engine.create_execution_context()


def on_gpu(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """`arrays` as tensors on the current GPU."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)).cuda() for name, array in arrays.items()}


def _captured(graph: _Graph) -> Any:
    """The last call of `graph` as a CUDA graph; None if it cannot be captured."""
    captured = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(captured):
            graph.enqueue()
    except (RuntimeError, TargetError):
        torch.cuda.synchronize()
        return None
    return captured
