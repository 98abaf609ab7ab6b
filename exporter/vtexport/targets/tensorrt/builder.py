"""ONNX file -> TensorRT plan, with TensorRT's progress and messages shown as vtexport's own.

The plugins are never registered here: TensorRT for RTX's parser ends the process on a node that resolves to one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorrt_rtx_bindings as trt

from vtexport.errors import TargetError

# Said of every int64 input; vtexport feeds int64, nothing is for the user to do.
_BINDING = re.compile(r"Make sure input \S+ has Int64 binding")


@dataclass(frozen=True)
class Build:
    """One plan to build.

    Attributes:
        name: the graph's name, for messages.
        architectures: compute capabilities, such as 89.
        shapes: input -> its smallest, usual and largest shape.
        report: called with (line, steps) when a phase begins.
        advance: called as its steps are done.
        warn: called with TensorRT's warnings and errors.
    """

    name: str
    architectures: Sequence[int]
    shapes: Mapping[str, tuple[Any, Any, Any]]
    report: Callable[[str, int | None], None]
    advance: Callable[[int], None]
    warn: Callable[[str], None]


def version() -> str:
    """The version of TensorRT for RTX."""
    return str(trt.__version__)


class _Logger(trt.ILogger):  # type: ignore[misc]
    """Keeps errors for the exception, hands warnings on once each."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warn: Callable[[str], None] = lambda _text: None
        self._said: set[str] = set()

    def begin(self, warn: Callable[[str], None]) -> None:
        """A new build: its warnings go to `warn`."""
        self.errors, self.warn, self._said = [], warn, set()

    def log(self, severity: Any, message: str) -> None:
        text = " ".join(message.split())
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
            self.errors.append(text)
        elif severity == trt.ILogger.WARNING and text not in self._said and not _BINDING.search(text):
            self._said.add(text)
            self.warn(f"TensorRT: {text}")


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """Shows the outermost phase of the build as a stage."""

    def __init__(self, build: Build) -> None:
        trt.IProgressMonitor.__init__(self)
        self._build = build
        self._root: str | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if self._root is None and not parent_phase:
            self._root = phase_name
            self._build.report(f"compile {self._build.name}: {phase_name}", num_steps)

    def step_complete(self, phase_name: str, step: int) -> bool:
        if phase_name == self._root:
            self._build.advance(1)
        return True

    def phase_finish(self, phase_name: str) -> None:
        if phase_name == self._root:
            self._root = None


@functools.cache
def _logger() -> _Logger:
    """TensorRT keeps one logger a process: the first that is given."""
    return _Logger()


def build_plan(source: Path, build: Build) -> bytes:
    """Compile the ONNX file `source`, strongly typed, into a serialized plan.

    Raises:
        TargetError: TensorRT refused; the message carries TensorRT's own first error.
    """
    logger = _logger()
    logger.begin(build.warn)

    def refused(step: str) -> TargetError:
        reason = logger.errors[0] if logger.errors else "no reason given"
        return TargetError(f"TensorRT cannot {step} {build.name} ({reason}); please report this model")

    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        logger.errors[:0] = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise refused("parse")
    config = builder.create_builder_config()
    monitor = _Monitor(build)
    config.progress_monitor = monitor
    config.num_compute_capabilities = len(build.architectures)
    for place, number in enumerate(build.architectures):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), place):
            raise refused(f"target compute capability {number} for")
    profile = builder.create_optimization_profile()
    for name, (low, usual, high) in build.shapes.items():
        profile.set_shape(name, low, usual, high)
    if config.add_optimization_profile(profile) < 0:
        raise refused("use the profile of")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise refused("build")
    return bytes(plan)
