"""doctor: which targets work on this machine, and what is missing for those that do not."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from vtexport.targets import TARGETS
from vtexport.targets.base import Availability

_PACKAGES = ("vtexport", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class TargetHealth:
    """One target: whether it builds and whether it runs here."""

    name: str
    build: Availability
    run: Availability


def examine() -> list[TargetHealth]:
    """The health of every target."""
    targets = {name: target() for name, target in TARGETS.items()}
    return [TargetHealth(name, target.can_build(), target.can_run()) for name, target in targets.items()]


def cuda_kernels() -> Availability:
    """Whether this installation has the CUDA kernels, and for which GPUs."""
    from vtexport.native import kernels as native

    if native.available("cuda"):
        code, ptx = (", ".join(map(str, numbers)) for numbers in native.architectures())
        return Availability(True, f"for compute capabilities {code}; as PTX of {ptx} for others from there on")
    return Availability(False, "installed without nvcc; install CUDA's toolkit, then vtexport again from its source")


def tensorrt_plugins() -> Availability:
    """Whether this installation has the library of TensorRT plugins."""
    from vtexport.native.plugins import library

    path = library()
    if path is not None:
        return Availability(True, str(path))
    return Availability(
        False, "needs nvcc and TensorRT's headers when vtexport is installed from source; set TENSORRT_ROOT to an SDK"
    )


def kernels() -> dict[str, Availability]:
    """Which parts of `plugins/` this installation has."""
    return {
        "CUDA kernels": cuda_kernels(),
        "TensorRT plugins": tensorrt_plugins(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the main packages, "not installed" for those that are missing."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed
