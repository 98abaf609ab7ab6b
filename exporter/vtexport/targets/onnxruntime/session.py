"""Running a bundle's graphs on ONNX Runtime: NumPy in, NumPy out, the KV cache updated in place."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from vtexport.arrays import Array
from vtexport.errors import TargetError, first_line
from vtexport.targets.base import prefill_name
from vtexport.targets.engine import Cache, LayerTimes, PrefillInput, PrefillOutput, VisionInput, VisionOutput


@dataclass
class OrtCache:
    """Buffers [B, G, M_i, D] per layer for keys and values, bound as both past and present of the decode session."""

    buffers: list[Any]
    binding: Any
    input_ids: Array
    length: Array
    position: Array
    logits: Array
    ranking: Array | None = None

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(buffer.shape())) * buffer.numpy().itemsize for buffer in self.buffers)


class OrtEngine:
    """The sessions of a bundle, one per graph; a session is made when it is first used."""

    def __init__(self, folder: Path, files: Mapping[str, str], threads: int = 0) -> None:
        self._paths = {name: folder / file for name, file in files.items()}
        self._threads = threads
        self._traces: Path | None = None
        self._sessions: dict[str, Any] = {}

    def load(self) -> None:
        for name in self._paths:
            self.session(name)

    def session(self, name: str) -> Any:
        """The ONNX Runtime session of graph `name`."""
        if name not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.log_severity_level = 3
            # For the self-check of TensorRT graphs with 4-bit weights: by default, activations would be rounded too.
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
            if self._traces is not None:
                options.enable_profiling = True
                options.profile_file_prefix = str(self._traces / name)
            try:
                self._sessions[name] = ort.InferenceSession(
                    self._paths[name], options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # ONNX Runtime raises its own exception types, none of them public
                reason = first_line(error)
                raise TargetError(
                    f"ONNX Runtime cannot load {self._paths[name]} ({reason}); build the bundle again"
                ) from error
        return self._sessions[name]

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
        outputs = dict(zip(names, session.run(names, inputs.feeds()), strict=True))
        return VisionOutput(outputs)

    def prefill(self, inputs: PrefillInput, new_tokens: int, bucket: int = 0) -> PrefillOutput:
        session = self.session(prefill_name(self._paths, bucket))
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, inputs.feeds()), strict=True))
        logits = outputs.pop("logits")
        present = {name: outputs.pop(name) for name in names if name.startswith("present.")}
        cache = self._cache(present, new_tokens, logits.shape[1])
        if "ranking" in outputs:
            cache.ranking = np.zeros_like(outputs["ranking"])
            cache.binding.bind_ortvalue_output("ranking", ort.OrtValue.ortvalue_from_numpy(cache.ranking))
            cache.binding.bind_cpu_input("image_position", inputs.image_position)
        return PrefillOutput(logits, cache, outputs)

    def _cache(self, present: Mapping[str, Array], new_tokens: int, vocabulary: int) -> OrtCache:
        binding = self.session("decode").io_binding()
        buffers = []
        for name, entries in present.items():
            batch, groups, tokens, size = entries.shape
            room = np.zeros((batch, groups, tokens + new_tokens, size), dtype=entries.dtype)
            room[:, :, :tokens] = entries
            # On the CPU the OrtValue shares the array's memory; bound twice, it is updated in place.
            buffer = ort.OrtValue.ortvalue_from_numpy(room)
            binding.bind_ortvalue_input(name.replace("present", "past"), buffer)
            binding.bind_ortvalue_output(name, buffer)
            buffers.append(buffer)
        layers = len(present) // 2
        input_ids = np.zeros((batch, 1), dtype=np.int64)
        length, position = (np.zeros((layers, batch), dtype=np.int64) for _ in range(2))
        logits = np.zeros((batch, vocabulary), dtype=np.float32)
        for name, array in (("input_ids", input_ids), ("length", length), ("position", position)):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        return OrtCache(buffers, binding, input_ids, length, position, logits)

    def decode(self, cache: Cache, tokens: Array, length: Array, position: Array) -> Array:
        assert isinstance(cache, OrtCache)
        cache.input_ids[:, 0] = tokens
        cache.length[:] = length
        cache.position[:] = position
        self.session("decode").run_with_iobinding(cache.binding)
        return cache.logits


def _node_times(trace: Path) -> dict[str, float]:
    """Milliseconds of each node, from a trace that ONNX Runtime wrote."""
    times: dict[str, float] = {}
    for event in json.loads(trace.read_bytes()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            label = f"{event['name'].removesuffix('_kernel_time')} ({event['args']['op_name']})"
            times[label] = times.get(label, 0.0) + event["dur"] / 1000
    return times
