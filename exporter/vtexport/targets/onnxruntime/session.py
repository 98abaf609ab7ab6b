"""Running a bundle's graphs on ONNX Runtime: NumPy in, NumPy out, the KV cache updated in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from vtexport.errors import TargetError, first_line
from vtexport.targets.base import Array, Cache, VisionOutput


@dataclass
class OrtCache:
    """Buffers [B, G, capacity, D] bound as both past and present of the decode session."""

    buffers: list[Any]
    binding: Any
    input_ids: Array
    length: Array
    logits: Array

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(buffer.shape())) * buffer.numpy().itemsize for buffer in self.buffers)


class OrtEngine:
    """The three sessions of a bundle; a session is made when it is first used."""

    def __init__(self, folder: Path, files: Mapping[str, str], threads: int = 0) -> None:
        self._paths = {name: folder / file for name, file in files.items()}
        self._threads = threads
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
            try:
                self._sessions[name] = ort.InferenceSession(
                    self._paths[name], options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # ONNX Runtime raises its own kinds, none of them public
                first = first_line(error)
                raise TargetError(
                    f"ONNX Runtime cannot load {self._paths[name]} ({first}); build the bundle again"
                ) from error
        return self._sessions[name]

    def vision(self, pixels: Array) -> VisionOutput:
        session = self.session("vision")
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(names, {"pixel_values": pixels}), strict=True))
        return VisionOutput(found["visual"], found.get("kept"), found.get("score"))

    def prefill(
        self, input_ids: Array, image_position: Array, text_length: Array, visual: Array, capacity: int
    ) -> tuple[Array, Cache]:
        feeds = {
            "input_ids": input_ids,
            "image_position": image_position,
            "text_length": text_length,
            "visual": visual,
        }
        logits, *present = self.session("prefill").run(None, feeds)
        return logits, self._cache(present, capacity, logits.shape[1])

    def _cache(self, present: list[Array], capacity: int, vocabulary: int) -> OrtCache:
        session = self.session("decode")
        batch, groups, tokens, size = present[0].shape
        binding = session.io_binding()
        buffers = []
        for layer in range(len(present) // 2):
            for part, entries in zip(("key", "value"), present[2 * layer : 2 * layer + 2], strict=True):
                room = np.zeros((batch, groups, max(capacity, tokens), size), dtype=entries.dtype)
                room[:, :, :tokens] = entries
                # On the CPU the OrtValue is the array's own memory; bound twice, it is updated in place.
                buffer = ort.OrtValue.ortvalue_from_numpy(room)
                binding.bind_ortvalue_input(f"past.{layer}.{part}", buffer)
                binding.bind_ortvalue_output(f"present.{layer}.{part}", buffer)
                buffers.append(buffer)
        input_ids = np.zeros((batch, 1), dtype=np.int64)
        length = np.zeros(batch, dtype=np.int64)
        logits = np.zeros((batch, vocabulary), dtype=np.float32)
        binding.bind_ortvalue_input("input_ids", ort.OrtValue.ortvalue_from_numpy(input_ids))
        binding.bind_ortvalue_input("length", ort.OrtValue.ortvalue_from_numpy(length))
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        return OrtCache(buffers, binding, input_ids, length, logits)

    def decode(self, cache: Cache, tokens: Array, length: Array) -> Array:
        assert isinstance(cache, OrtCache)
        cache.input_ids[:, 0] = tokens
        cache.length[:] = length
        self.session("decode").run_with_iobinding(cache.binding)
        return cache.logits
