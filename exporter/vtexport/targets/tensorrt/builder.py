"""Compiles an ONNX file into a TensorRT plan; shows TensorRT's progress and messages as vtexport's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vtexport.errors import InputError, TargetError
from vtexport.targets.tensorrt.bindings import Bindings
from vtexport.targets.tensorrt.profiles import Profile


@dataclass(frozen=True)
class Settings:
    """The builder settings, equal for all plans of a bundle.

    Attributes:
        architectures: compute capabilities to build for ahead of time, such as 89; empty for this GPU.
        version_compatible: whether later versions of TensorRT can load the plan.
        hardware: a name of `HardwareCompatibilityLevel`.
        strip_weights: leave the weights out of the plan; they are put back when it is opened.
        timing_cache: a file of TensorRT's measurements, read if it is there and written back.
    """

    architectures: Sequence[int] = ()
    version_compatible: bool = False
    hardware: str = "NONE"
    strip_weights: bool = False
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Build:
    """One plan to build.

    Attributes:
        name: the graph's name, for messages.
        profiles: of the inputs' shapes; see `vtexport.targets.tensorrt.profiles`.
        settings: see `Settings`.
        report: called with (line, steps) when a phase begins.
        advance: called as its steps are done.
        warn: called with TensorRT's warnings and errors.
    """

    name: str
    profiles: Sequence[Profile]
    settings: Settings
    report: Callable[[str, int | None], None]
    advance: Callable[[int], None]
    warn: Callable[[str], None]


def build_plan(bindings: Bindings, source: Path, plan: Path, build: Build) -> None:
    """Compile the ONNX file `source`, strongly typed, into the file `plan`, to which TensorRT writes as it serializes.

    Raises:
        TargetError: TensorRT refused; the message carries TensorRT's own first error.
        InputError: the timing cache is another machine's.
        OSError: `plan` cannot be written.
    """
    trt, logger, settings = bindings.trt, bindings.logger, build.settings
    logger.begin(build.warn)

    def refused(step: str) -> TargetError:
        return TargetError(f"TensorRT cannot {step} {build.name} ({bindings.first_error}); please report this model")

    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        logger.errors[:0] = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise refused("parse")
    config = builder.create_builder_config()
    monitor = _monitor(trt, build)
    config.progress_monitor = monitor
    # With this, layers are profiled under their names.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.architectures:
        config.num_compute_capabilities = len(settings.architectures)
    for place, number in enumerate(settings.architectures):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), place):
            raise refused(f"target compute capability {number} for")
    # TensorFloat-32 has too few digits: scores would rank tokens differently than on other targets.
    config.clear_flag(trt.BuilderFlag.TF32)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware != "NONE":  # TensorRT for RTX warns about any setting
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, settings.hardware)
    if settings.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        # The weights that come back are the same ones, so that TensorRT may still choose kernels by their values.
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    for number, shapes in enumerate(build.profiles):
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in shapes.items():
            profile.set_shape(name, low, usual, high)
        if config.add_optimization_profile(profile) != number:
            raise refused("use the profile of")
    if settings.timing_cache is not None:
        read_timings(config, settings.timing_cache)
    with plan.open("wb") as file:
        writer = _writer(trt, file)
        built = builder.build_serialized_network_to_stream(network, config, writer)
    # TensorRT takes no notice of a piece that could not be written.
    if writer.failure is not None:
        raise writer.failure
    if not built or plan.stat().st_size == 0:
        raise refused("build")
    if settings.timing_cache is not None:
        write_timings(config, settings.timing_cache)


def _writer(trt: Any, file: BinaryIO) -> Any:
    """Writes a plan to `file` in the pieces that TensorRT hands over."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.failure: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.failure = error
                return 0

    return Writer()


def _monitor(trt: Any, build: Build) -> Any:
    """Shows the outermost phase of the build as a stage."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.root: str | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if self.root is None and not parent_phase:
                self.root = phase_name
                build.report(f"compile {build.name}: {phase_name}", num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.root:
                build.advance(1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name == self.root:
                self.root = None

    return Monitor()


def read_timings(config: Any, path: Path) -> None:
    """Let a build start from the kernel timings in `path`, if it exists."""
    try:
        known = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise InputError(f"--timing-cache {path} cannot be read ({error.strerror}); give another file") from error
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputError(
            f"--timing-cache {path} is not a timing cache of this GPU and TensorRT; give another file, or none"
        )


def write_timings(config: Any, path: Path) -> None:
    """Write a build's kernel timings to `path`."""
    # Under another name first: builds that run at the same time never see half a file.
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_bytes(bytes(config.get_timing_cache().serialize()))
    written.replace(path)
