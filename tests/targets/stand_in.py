"""A stand-in for TensorRT's runtime that behaves as documented, on a CPU: it runs the graph that TensorRT would parse.

A plan is a line of JSON with the profiles, and the ONNX file. A context keeps to its profile, answers False to what the
documentation forbids, reads and writes at the addresses it was given, and writes caches into their inputs' buffers.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes  # noqa: F401 - NumPy's bfloat16
import numpy as np
import onnx
import onnxruntime as ort
import torch

from vtexport.errors import TargetError
from vtexport.targets.tensorrt.builder import Build

_NAMES = {"float": "FLOAT", "float16": "HALF", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
_ARRAYS = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}


def compile_apart(_package: str, _plugins: Path | None, source: Path, plan: Path, build: Build) -> None:
    """What stands in for the builder: the ONNX file with its weights."""
    model = onnx.load(source, load_external_data=False)
    for tensor in model.graph.initializer:
        # By hand: ONNX's own loader refuses files with several hard links, as weights of a bundle are.
        at = {entry.key: entry.value for entry in tensor.external_data}
        with (source.parent / at["location"]).open("rb") as file:
            file.seek(int(at["offset"]))
            tensor.raw_data = file.read(int(at["length"]))
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT
    plan.write_bytes(json.dumps(build.profiles).encode() + b"\n" + model.SerializeToString())


class Logger:
    """The bindings' logger."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def begin(self, _warn: Callable[[str], None] = print) -> None:
        self.errors = []


class _IStreamReaderV2:
    def __init__(self) -> None:
        pass


class _IProfiler(_IStreamReaderV2):
    pass


SeekPosition = Enum("SeekPosition", "SET CUR END")
TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
Strategy = Enum("Strategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")
GraphStrategy = Enum("GraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")


class TensorRT:
    """The module, with a record of what happened: runs by profile, contexts made, and settings to misbehave by."""

    IStreamReaderV2 = _IStreamReaderV2
    IProfiler = _IProfiler
    SeekPosition = SeekPosition
    TensorIOMode = TensorIOMode
    ExecutionContextAllocationStrategy = Strategy

    def __init__(self, captures_itself: bool = False) -> None:
        self.runs: list[int] = []
        self.contexts: list[Context] = []
        self.last: Context
        self.bound = 0
        self.fails: set[str] = set()
        self.largest_read = 0
        if captures_itself:
            self.CudaGraphStrategy = GraphStrategy
        self.__version__ = "1.7.1.116"

    def Runtime(self, logger: Logger) -> Any:
        return _Runtime(self, logger)


class _Runtime:
    engine_host_code_allowed = False

    def __init__(self, trt: TensorRT, logger: Logger) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, reader: Any) -> Engine | None:
        pieces = []
        assert reader.seek(0, SeekPosition.SET)
        while piece := reader.read(1 << 20, 0):
            self.trt.largest_read = max(self.trt.largest_read, len(piece))
            pieces.append(piece)
        data = b"".join(pieces)
        if b"\n" not in data or "deserialise" in self.trt.fails:
            self.logger.errors.append("the plan is of another version")
            return None
        head, _, body = data.partition(b"\n")
        return Engine(self.trt, self.logger, json.loads(head), body)


class Engine:
    device_memory_size_v2 = 512

    def __init__(self, trt: TensorRT, logger: Logger, profiles: list[dict[str, Any]], data: bytes) -> None:
        self.trt, self.logger, self.profiles = trt, logger, profiles
        model = onnx.load_from_string(data)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.ports: dict[str, Any] = {}
        self.inputs = [port.name for port in model.graph.input]
        for port in (*model.graph.input, *model.graph.output):
            tensor = port.type.tensor_type
            kind = _NAMES[onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name.replace("float32", "float")]
            dims = [d.dim_param or d.dim_value for d in tensor.shape.dim]
            self.ports[port.name] = SimpleNamespace(kind=kind, dims=dims)

    @property
    def num_io_tensors(self) -> int:
        return len(self.ports)

    def get_tensor_name(self, number: int) -> str:
        return list(self.ports)[number]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.ports[name].kind)

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self.ports[name].dims]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return self.profiles[profile][name]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present", "past") if name.startswith("present.") else None

    def create_runtime_config(self) -> Any:
        return _Settings()

    def create_execution_context(self, settings: Any) -> Context | None:
        assert settings.strategy == Strategy.USER_MANAGED
        if "context" in self.trt.fails:
            self.logger.errors.append("out of memory")
            return None
        self.trt.contexts.append(Context(self, settings))
        return self.trt.contexts[-1]


class _Settings:
    strategy: Any = None
    cuda_graph_strategy: Any = GraphStrategy.DISABLED
    cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        return RuntimeCache()

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    held = b""

    def deserialize(self, data: bytes) -> bool:
        self.held = data
        return True

    def serialize(self) -> bytes:
        return self.held + b"kernels;"


class Context:
    def __init__(self, engine: Engine, settings: Any) -> None:
        self.engine, self.settings, self.profiler = engine, settings, None
        self.profile: int | None = None
        self.memory: tuple[int, int] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream != 0, "the default stream makes TensorRT synchronise the device"
        if not 0 <= profile < len(self.engine.profiles):
            return False
        self.profile = profile
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = address, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.engine.trt.bound += 1
        low, _, high = self.engine.profiles[self.profile][name]
        if len(shape) != len(low) or any(not a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            # As documented, the shape set before stays.
            self.engine.logger.errors.append(f"{name} is outside the profile")
            return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address == 0 or name not in self.engine.ports:
            return False
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> list[int]:
        known: dict[str, int] = {}
        for port in self.engine.inputs:
            known |= dict(zip(map(str, self.engine.ports[port].dims), self.shapes[port], strict=True))

        def value(extent: str | int) -> int:
            if isinstance(extent, int):
                return extent
            terms = [re.split(r"\*", term) for term in extent.split(" + ")]
            return sum(int(np.prod([int(part) if part.isdigit() else known[part] for part in term])) for term in terms)

        return [value(extent) for extent in self.engine.ports[name].dims]

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        if stream == 0 or self.memory is None or set(self.addresses) != set(engine.ports) or "run" in engine.trt.fails:
            engine.logger.errors.append("the context is not complete")
            return False
        feeds = {name: self._view(name, self.shapes[name]).copy() for name in engine.inputs}
        names = [name for name in engine.ports if name not in engine.inputs]
        for name, array in zip(names, engine.session.run(names, feeds), strict=True):
            source = engine.get_aliased_input_tensor(name)
            if source is not None and self.addresses[name] != self.addresses[source]:
                engine.logger.errors.append(f"{name} is not at {source}")
                return False
            assert list(array.shape) == self.get_tensor_shape(name)
            self._view(name, array.shape)[...] = array
        engine.trt.runs.append(self.profile or 0)
        engine.trt.last = self
        if self.profiler is not None:
            self.profiler.report_layer_time(f"layer of profile {self.profile}", 0.25)
        return True

    def _view(self, name: str, shape: Sequence[int]) -> np.ndarray:
        kind = np.dtype(_ARRAYS[self.engine.ports[name].kind])
        count = int(np.prod(shape))
        if count == 0:
            return np.zeros(shape, kind)
        memory = (ctypes.c_char * (count * kind.itemsize)).from_address(self.addresses[name])
        return np.frombuffer(memory, kind).reshape(shape)


class _Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _end: _Event) -> float:
        return 0.5


class Gpu:
    """In place of `vtexport.targets.tensorrt.gpu.Gpu`: memory is the host's, and can run short."""

    handle = 7

    def __init__(self) -> None:
        self.captures, self.replays = 0, 0
        self.capturable = True
        self.full = False
        self.inside = False
        self.trt: TensorRT | None = None

    @contextmanager
    def working(self):
        before, self.inside = self.inside, True
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise TargetError("the GPU is out of memory; build again with a smaller --max-batch") from error
        finally:
            self.inside = before

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        # What memory held before: large numbers and numbers that are none.
        made = self.zeros(shape, dtype)
        return made.fill_(float("nan")) if dtype.is_floating_point else made.fill_(1)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        assert self.inside
        made = torch.zeros(tuple(shape), dtype=dtype)
        if self.full and made.ndim == 4:  # a cache
            raise torch.OutOfMemoryError("no memory")
        return made

    def put(self, array: np.ndarray) -> torch.Tensor:
        assert self.inside
        return torch.from_numpy(np.array(array, order="C"))

    def write(self, array: np.ndarray, place: torch.Tensor) -> None:
        assert self.inside
        place.copy_(torch.from_numpy(np.array(array, order="C")))

    def fetch(self, tensor: torch.Tensor) -> np.ndarray:
        assert self.inside
        return tensor.numpy().copy()

    def free_unused(self) -> None:
        self.full = False

    def event(self) -> _Event:
        return _Event()

    def captured(self, call: Callable[[], None]) -> Callable[[], None] | None:
        if not self.capturable:
            return None
        self.captures += 1
        call()
        # A graph keeps the shapes and addresses of its capture, and is sound while its context keeps its shapes.
        assert self.trt is not None
        context = self.trt.last
        shapes, addresses = dict(context.shapes), dict(context.addresses)

        def replay() -> None:
            self.replays += 1
            assert context.shapes == shapes
            context.addresses = dict(addresses)
            assert context.execute_async_v3(self.handle)

        return replay
