"""Graphs of another target on ONNX Runtime: how they are checked where that target cannot run itself."""

from __future__ import annotations

from dataclasses import dataclass

from vtexport.targets.onnxruntime.target import OnnxRuntimeTarget


@dataclass(frozen=True)
class OnnxRuntimeCheck(OnnxRuntimeTarget):
    """ONNX Runtime with caches of that target's capacity."""

    room: int | None = None

    @property
    def cache_room(self) -> int | None:
        return self.room
