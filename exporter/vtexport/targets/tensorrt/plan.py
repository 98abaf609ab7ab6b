"""A TensorRT plan on the GPU: how it is read, its execution contexts, and one run of it. No return value is trusted."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vtexport.errors import TargetError
from vtexport.targets.tensorrt.bindings import Bindings
from vtexport.targets.tensorrt.gpu import Gpu

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
#: bytes of a plan that are in host memory at a time while it is read
_PIECE = 64 << 20


@dataclass(frozen=True)
class Reading:
    """How a plan is read.

    Attributes:
        source: the ONNX file to put weights back from, if the plan was built without.
        host_code: whether the plan carries code for the host, which later versions of TensorRT need.
    """

    source: Path | None = None
    host_code: bool = False


class Plan:
    """A deserialised plan with its execution contexts, each made at its first run.

    There is one per optimisation profile, and one more for every owner of buffers that never change: what was captured
    in a CUDA graph stays sound only while nobody gives its context other shapes. Contexts share their working memory,
    because one engine runs one after the other.
    """

    def __init__(self, bindings: Bindings, gpu: Gpu, path: Path, reading: Reading) -> None:
        self._bindings, self._gpu, self._path = bindings, gpu, path
        trt = bindings.trt
        bindings.logger.begin()
        # The engine needs its runtime for as long as it lives.
        self._runtime = trt.Runtime(bindings.logger)
        self._runtime.engine_host_code_allowed = reading.host_code
        with path.open("rb") as file:
            self.engine = self._runtime.deserialize_cuda_engine(_reader(trt, file))
        if self.engine is None:
            raise TargetError(
                f"TensorRT cannot load {path} ({bindings.first_error}); build the bundle again on this GPU"
            )
        if reading.source is not None:
            _refit(bindings, self.engine, reading.source)
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.kinds: dict[str, torch.dtype] = {}
        for number in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(number)
            self.kinds[name] = _DTYPES[self.engine.get_tensor_dtype(name).name]
            inside = self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.inputs if inside else self.outputs).append(name)
        #: outputs that TensorRT writes into the buffer of an input, by that input: the caches
        self.in_place: dict[str, str] = {}
        # TensorRT has had such outputs since 10.15; vision plans run on older ones too.
        if hasattr(self.engine, "get_aliased_input_tensor"):
            aliases = {name: self.engine.get_aliased_input_tensor(name) for name in self.outputs}
            self.in_place = {name: source for name, source in aliases.items() if source}
        self._contexts: dict[tuple[int, Hashable], Any] = {}
        self._profilers: dict[int, Any] = {}
        self._bound: set[tuple[int, Hashable]] = set()
        self._runtime_cache: Any = None
        self._memory: Any = None
        # Of the length that an empty tensor has not: TensorRT refuses a null address.
        self._nothing = gpu.zeros([16], torch.uint8)

    @property
    def captures_itself(self) -> bool:
        """Whether TensorRT replays runs as CUDA graphs by itself, as TensorRT for RTX does."""
        return hasattr(self._bindings.trt, "CudaGraphStrategy")

    def extent(self, name: str) -> list[int]:
        """The shape of input or output `name`, -1 where it is dynamic."""
        return [int(size) for size in self.engine.get_tensor_shape(name)]

    def run(
        self,
        profile: int,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any] | None = None,
        owner: Hashable = None,
    ) -> dict[str, Any]:
        """Run once on the engine's stream, and return the outputs but for those written in place.

        Args:
            profile: number of the optimisation profile.
            inputs: every input, as tensors on the GPU.
            outputs: where outputs go; others are allocated.
            owner: who always gives these very tensors, so that they are set once; None for tensors of this run.

        Raises:
            TargetError: TensorRT refuses a shape or an address, or fails.
        """
        key, results = (profile, owner), dict(outputs or {})
        if owner is None or key not in self._bound:
            self._bind(self._context(profile, owner), profile, inputs, results)
            if owner is not None:
                self._bound.add(key)
        self.enqueue(profile, owner)
        return results

    def enqueue(self, profile: int, owner: Hashable = None) -> None:
        """Run once more, on the shapes and addresses set last."""
        self._bindings.logger.begin()
        context = self._context(profile, owner)
        if not context.execute_async_v3(self._gpu.handle):
            raise self._failed("TensorRT failed to run {path} ({error}); build the bundle again on this GPU")

    def profile_layers(self, profilers: Mapping[int, Any] | None) -> None:
        """Give the contexts of profiles these profilers; None takes them away."""
        # A profiler cannot be removed from a context; a new context has none.
        self._contexts.clear()
        self._bound.clear()
        self._profilers = dict(profilers or {})

    def _bind(self, context: Any, profile: int, inputs: Mapping[str, Any], results: dict[str, Any]) -> None:
        assert set(inputs) == set(self.inputs), f"{self._path} takes {self.inputs}, not {list(inputs)}"
        self._bindings.logger.begin()
        for name, tensor in inputs.items():
            if tensor.dtype != self.kinds[name]:
                raise TargetError(
                    f"{self._path} takes {name} as {self.kinds[name]}, not {tensor.dtype}; please report this"
                )
            if not context.set_input_shape(name, tuple(tensor.shape)):
                low, _, high = self.engine.get_tensor_profile_shape(name, profile)
                raise TargetError(
                    f"{self._path} takes {name} of {list(low)} to {list(high)}, not {list(tensor.shape)}; build the "
                    "bundle again with a larger --max-batch or --max-text"
                )
            self._place(context, name, tensor)
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise self._failed("TensorRT cannot infer shapes of {path} ({error}); please report this") from error
        if missing:
            raise self._failed(f"TensorRT has no shape for {', '.join(missing)} of {{path}} ({{error}})")
        for name in self.outputs:
            if name in self.in_place:
                self._place(context, name, inputs[self.in_place[name]])
                continue
            if name not in results:
                shape = [int(size) for size in context.get_tensor_shape(name)]
                if min(shape, default=0) < 0:
                    raise self._failed(f"TensorRT does not know the shape of {name} of {{path}} ({{error}})")
                results[name] = self._gpu.empty(shape, self.kinds[name])
            self._place(context, name, results[name])

    def _place(self, context: Any, name: str, tensor: Any) -> None:
        address = tensor.data_ptr() if tensor.numel() else self._nothing.data_ptr()
        if not context.set_tensor_address(name, address):
            raise self._failed(f"TensorRT does not take the address of {name} of {{path}} ({{error}})")

    def release(self, owner: Hashable) -> None:
        """Give up the contexts of `owner`."""
        self._bound = {key for key in self._bound if key[1] != owner}
        self._contexts = {key: context for key, context in self._contexts.items() if key[1] != owner}

    def _context(self, profile: int, owner: Hashable) -> Any:
        if (profile, owner) not in self._contexts:
            self._contexts[profile, owner] = self._new_context(profile)
        return self._contexts[profile, owner]

    def _new_context(self, profile: int) -> Any:
        trt = self._bindings.trt
        self._bindings.logger.begin()
        runtime_config = self.engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.captures_itself:
            self._specialise(runtime_config, profile)
        context = self.engine.create_execution_context(runtime_config)
        if context is None:
            raise self._failed("TensorRT cannot run {path} ({error}); free memory on this GPU")
        if not context.set_optimization_profile_async(profile, self._gpu.handle):
            raise self._failed(f"{{path}} has no optimisation profile {profile} ({{error}}); build the bundle again")
        size = int(self.engine.device_memory_size_v2)
        if self._memory is None:
            self._memory = self._gpu.empty([max(size, 1)], torch.uint8)
        context.set_device_memory(self._memory.data_ptr(), size)
        if profile in self._profilers:
            context.profiler = self._profilers[profile]
        return context

    def _specialise(self, runtime_config: Any, profile: int) -> None:
        """TensorRT for RTX: replay runs as CUDA graphs, and keep on disk the kernels that it compiles for this GPU."""
        trt = self._bindings.trt
        if profile not in self._profilers:
            runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._runtime_cache is None:
            self._runtime_cache = runtime_config.create_runtime_cache()
            place = runtime_cache_file(self._path, self._bindings.version)
            if place.is_file():
                # A cache of another GPU is refused, and written anew.
                self._runtime_cache.deserialize(place.read_bytes())
            weakref.finalize(self, _keep, self._runtime_cache, place)
        runtime_config.set_runtime_cache(self._runtime_cache)

    def _failed(self, text: str) -> TargetError:
        return TargetError(text.format(path=self._path, error=self._bindings.first_error))


def runtime_cache_file(plan: Path, version: str) -> Path:
    """The file in the user's cache folder for the kernels that TensorRT for RTX `version` compiles for `plan`."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    status = plan.stat()
    key = f"{plan.resolve()} {status.st_size} {status.st_mtime_ns} {version}"
    return root / "vtexport" / "tensorrt-rtx" / hashlib.sha256(key.encode()).hexdigest()[:32]


def _keep(cache: Any, place: Path) -> None:
    """Write a runtime cache to `place`; a folder that cannot be written only costs the next start time."""
    written = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        written.write_bytes(bytes(cache.serialize()))
        written.replace(place)
    except OSError:
        written.unlink(missing_ok=True)


def _reader(trt: Any, file: BinaryIO) -> Any:
    """Reads a plan from `file` in the pieces that TensorRT asks for, so that it is never whole in host memory."""
    whence = {trt.SeekPosition.SET: os.SEEK_SET, trt.SeekPosition.CUR: os.SEEK_CUR, trt.SeekPosition.END: os.SEEK_END}

    class Reader(trt.IStreamReaderV2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)

        def read(self, num_bytes: int, _stream: int) -> bytes:
            return file.read(min(num_bytes, _PIECE))

        def seek(self, offset: int, where: Any) -> bool:
            # TensorRT counts offsets from the end backwards.
            file.seek(-offset if where == trt.SeekPosition.END else offset, whence[where])
            return True

    return Reader()


def _refit(bindings: Bindings, engine: Any, source: Path) -> None:
    """Put the weights of the ONNX file `source` into an engine that was built without them."""
    trt = bindings.trt
    refitter = trt.Refitter(engine, bindings.logger)
    parser = trt.OnnxParserRefitter(refitter, bindings.logger)
    if not parser.refit_from_file(str(source)) or not refitter.refit_cuda_engine():
        raise TargetError(f"TensorRT cannot put the weights of {source} back ({bindings.first_error}); build again")
