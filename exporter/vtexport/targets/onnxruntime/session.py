"""Running a bundle's graphs on ONNX Runtime: NumPy in, NumPy out, the KV cache updated in place."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from vtexport.arrays import Array
from vtexport.errors import TargetError, first_line
from vtexport.pruning import PruningPlan
from vtexport.targets.engine import Cache, LayerTimes, PrefillInput, PrefillOutput, VisionInput, VisionOutput
from vtexport.targets.external import check_graph
from vtexport.targets.language import LANGUAGE, LanguageCalls


@dataclass
class OrtCache:
    """A batch's KV cache: buffers [B, G, M_i, D] for keys and values by the names of the graph's inputs.

    Attributes:
        buffers: each is both past and present of every call, so that it is updated in place.
        prompt: the inputs of the call that filled them, or what decoding needs of these.
        places: [N] int64, places of each layer's buffers that any row has filled.
        ranking: see `vtexport.targets.engine.Cache`.
    """

    buffers: dict[str, Array]
    prompt: Mapping[str, Array]
    places: Array
    ranking: Array | None = None

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def broken_layer(self, row: int) -> int | None:
        broken = [_layer(name) for name, buffer in self.buffers.items() if not np.isfinite(buffer[row]).all()]
        return min(broken, default=None)


class OrtEngine:
    """The sessions of a bundle, one per graph; a session is made when it is first used.

    Args:
        folder: the bundle.
        files: its files by graph.
        plans: the plans that share the language graph.
        threads: threads of each session; 0 leaves the number to ONNX Runtime.
        exact: whether products with quantised weights take activations as they are; see `Target.open_exact`.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, str],
        plans: Sequence[PruningPlan],
        threads: int = 0,
        exact: bool = False,
    ) -> None:
        self._paths = {name: folder / file for name, file in files.items()}
        self._plans, self._calls = plans, LanguageCalls(plans)
        self._threads, self._exact = threads, exact
        self._traces: Path | None = None
        self._sessions: dict[str, Any] = {}
        # Sessions run in several threads at once, but each is to be made once.
        self._lock = threading.RLock()

    def load(self) -> None:
        for name in self._paths:
            self.session(name)

    def session(self, name: str) -> Any:
        """The ONNX Runtime session of graph `name`."""
        with self._lock:
            if name not in self._sessions:
                self._sessions[name] = self._opened(name)
            return self._sessions[name]

    def _opened(self, name: str) -> Any:
        """A new session of graph `name`."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        # Errors are raised, and told in one line.
        options.log_severity_level = 4
        # For the self-check of TensorRT graphs with 4-bit weights: by default, activations would be rounded too.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if self._traces is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._traces / name)
        check_graph(self._paths[name])
        try:
            model = _exact(self._paths[name], options) if self._exact else self._paths[name]
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises its own exception types, none of them public
            reason = first_line(error)
            raise TargetError(
                f"ONNX Runtime cannot load {self._paths[name]} ({reason}); build the bundle again"
            ) from error

    def admit(self, rows: int, text: int, new_tokens: int) -> None:
        """Every extent but the model's own is open here."""

    def device_times(self) -> dict[str, float]:
        return {}

    def layer_times(self, call: Callable[[], None]) -> LayerTimes:
        plain, self._sessions = self._sessions, {}
        with tempfile.TemporaryDirectory() as folder:
            self._traces = Path(folder)
            try:
                call()
                return {name: _node_times(Path(session.end_profiling())) for name, session in self._sessions.items()}
            finally:
                self._traces, self._sessions = None, plain

    def vision(self, inputs: VisionInput) -> VisionOutput:
        session = self.session("vision")
        names = [output.name for output in session.get_outputs()]
        with _running(self._paths["vision"]):
            outputs = dict(zip(names, session.run(names, inputs.feeds()), strict=True))
        return VisionOutput(outputs)

    def prefill(self, inputs: PrefillInput, new_tokens: int, bucket: int = 0) -> PrefillOutput:
        prompt = self._calls.prefill(inputs, bucket)
        places = inputs.input_ids.shape[1] + np.array(self._plans[bucket].per_layer, dtype=np.int64)
        cache = OrtCache(self._buffers(len(inputs.input_ids), places + new_tokens), prompt, places)
        outputs = self._run(cache, prompt)
        if "ranking" in outputs:
            cache.ranking = np.zeros_like(outputs["ranking"])
        return self._calls.prefilled(outputs, cache, bucket)

    def decode(self, cache: Cache, tokens: Array, length: Array, position: Array) -> Array:
        assert isinstance(cache, OrtCache)
        given = self._calls.decode(cache.prompt, tokens, length, position)
        outputs = self._run(cache, given, ["logits"] if cache.ranking is None else ["logits", "ranking"])
        cache.ranking = outputs.get("ranking")
        # Of rows that have left, nothing counts any more.
        cache.places = length.max(axis=1) + 1
        return outputs["logits"]

    def retain(self, cache: Cache, rows: Array) -> bool:
        assert isinstance(cache, OrtCache)
        # One buffer after the other, so that the cache is never there twice.
        for name, buffer in cache.buffers.items():
            cache.buffers[name] = _rows_of(buffer, rows, int(cache.places[_layer(name)]))
        cache.prompt = self._calls.retained(cache.prompt, rows)
        cache.ranking = None if cache.ranking is None else cache.ranking[rows]
        return True

    def join(self, cache: Cache, other: Cache) -> bool:
        assert isinstance(cache, OrtCache)
        assert isinstance(other, OrtCache)
        for name, buffer in cache.buffers.items():
            layer = _layer(name)
            pair = ((buffer, int(cache.places[layer])), (other.buffers[name], int(other.places[layer])))
            cache.buffers[name] = _joined(pair)
        cache.places = np.maximum(cache.places, other.places)
        cache.prompt = self._calls.joined(cache.prompt, other.prompt)
        if cache.ranking is not None:
            assert other.ranking is not None, "all caches of an engine rank or none"
            cache.ranking = np.concatenate([cache.ranking, other.ranking])
        return True

    def _buffers(self, rows: int, rooms: Array) -> dict[str, Array]:
        """Empty caches for `rows` prompts, with a layer's room of `rooms` [N] unless the graph has one of its own."""
        buffers = {}
        for port in self.session(LANGUAGE).get_inputs():
            if port.name.startswith("past."):
                _, groups, room, size = port.shape
                if not isinstance(room, int):
                    room = int(rooms[_layer(port.name)])
                buffers[port.name] = np.zeros((rows, groups, room, size), _FLOATS[port.type])
        return buffers

    def _run(self, cache: OrtCache, given: Mapping[str, Array], wanted: Sequence[str] = ()) -> dict[str, Array]:
        """Run the language graph on `cache`, and return its outputs of the `wanted` names, or all but the caches."""
        session = self.session(LANGUAGE)
        binding = session.io_binding()
        for name, array in given.items():
            binding.bind_cpu_input(name, array)
        for name, buffer in cache.buffers.items():
            # On the CPU the OrtValue shares the array's memory; bound twice, it is updated in place.
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past", "present"), value)
        names = list(wanted) or [port.name for port in session.get_outputs() if not port.name.startswith("present.")]
        for name in names:
            binding.bind_output(name)
        with _running(self._paths[LANGUAGE]):
            session.run_with_iobinding(binding)
        values = binding.get_outputs()[len(cache.buffers) :]
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}


_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@contextmanager
def _running(path: Path) -> Iterator[None]:
    """Errors of ONNX Runtime while the graph in `path` runs, as ours.

    Raises:
        TargetError: weights or a graph are damaged, or memory is short; what ONNX Runtime says tells which.
    """
    try:
        yield
    except Exception as error:  # its own exception types, none of them public
        raise TargetError(
            f"ONNX Runtime cannot run {path} ({first_line(error)}); if memory is not short, check the bundle with "
            "vtexport inspect --verify"
        ) from error


def _layer(name: str) -> int:
    """The layer of the buffer `name`."""
    return int(name.split(".")[1])


def _rows_of(buffer: Array, rows: Array, places: int) -> Array:
    """A copy of `rows` of a buffer [B, G, M, D].

    Of the room behind its first `places`, nothing is touched: no memory is taken for it before it is filled.
    """
    copy = np.zeros((len(rows), *buffer.shape[1:]), buffer.dtype)
    for new, old in enumerate(rows):
        copy[new, :, :places] = buffer[old, :, :places]
    return copy


def _joined(parts: Sequence[tuple[Array, int]]) -> Array:
    """Buffers [B, G, M, D] one behind the other, with the room of the larger one; see `_rows_of`.

    Args:
        parts: each with the number of its places that are filled.
    """
    rows, room = sum(len(buffer) for buffer, _ in parts), max(buffer.shape[2] for buffer, _ in parts)
    like = parts[0][0]
    joined, first = np.zeros((rows, like.shape[1], room, like.shape[3]), like.dtype), 0
    for buffer, places in parts:
        joined[first : first + len(buffer), :, :places] = buffer[:, :, :places]
        first += len(buffer)
    return joined


def _exact(path: Path, options: ort.SessionOptions) -> bytes:
    """The graph in `path` without rounded activations; `options` get to know where its weights lie."""
    model = ir.load(path)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def _node_times(trace: Path) -> dict[str, float]:
    """Milliseconds of each node, from a trace that ONNX Runtime wrote."""
    times: dict[str, float] = {}
    for event in json.loads(trace.read_bytes()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            label = f"{event['name'].removesuffix('_kernel_time')} ({event['args']['op_name']})"
            times[label] = times.get(label, 0.0) + event["dur"] / 1000
    return times
