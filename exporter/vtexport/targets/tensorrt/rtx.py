"""The target `tensorrt-rtx`: TensorRT plans built ahead of time, on any machine, for RTX GPUs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from vtexport.errors import InputError
from vtexport.options import Meta
from vtexport.targets.base import Availability, Compiled
from vtexport.targets.tensorrt.target import (
    AnyTensorRT,
    Device,
    Quantize,
    inline_functions,
    quantize_scheme,
    this_gpu,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtexport.targets.quantize import Scheme
    from vtexport.targets.tensorrt.builder import Settings

#: compute capabilities to compile for; TensorRT for RTX also knows 75, but has no fp32 matmul there, and scores
#: are fp32 on every target so that every target keeps the same tokens
ARCHITECTURES = (80, 86, 89, 120, 121)


@dataclass(frozen=True)
class TensorRTRTXTarget(AnyTensorRT):
    """TensorRT for RTX. Pruning runs as the ops' function bodies: its parser ends the process at a plugin's node."""

    name: ClassVar[str] = "tensorrt-rtx"
    summary: ClassVar[str] = "TensorRT for RTX: built without a GPU, runs on RTX GPUs"
    package: ClassVar[str] = "tensorrt_rtx_bindings"

    sm: Annotated[
        str, Meta(description="Compute capabilities of the GPUs to build for.", extra={"metavar": "LIST"})
    ] = "86,89,120"
    quantize: Quantize = ""

    def can_build(self) -> Availability:
        for module in ("tensorrt_rtx_bindings", "tensorrt_rtx_libs"):
            if importlib.util.find_spec(module) is None:
                return Availability(
                    False,
                    "TensorRT for RTX is not installed; install it with: pip install 'vtexport[tensorrt-rtx]'",
                )
        from importlib.metadata import version

        return Availability(True, f"TensorRT for RTX {version('tensorrt-rtx-cu13-bindings')}")

    def scheme(self) -> Scheme | None:
        return quantize_scheme(self.quantize)

    def settings(self) -> Settings:
        from vtexport.targets.tensorrt.builder import Settings

        if self.strip_weights and this_gpu() is None:
            # Without a GPU, TensorRT for RTX 1.7.1 fails to build even a single MatMul without weights.
            raise InputError("--strip-weights with target tensorrt-rtx needs a GPU in this machine; leave it out")
        return Settings(architectures=parse_architectures(self.sm), strip_weights=self.strip_weights)

    def prepare(self, model: ir.Model) -> None:
        inline_functions(model)

    def check_gpu(self, gpu: Device, compiled: Compiled) -> str | None:
        if gpu.capability in parse_architectures(self.sm):
            return None
        return f"was built for compute capabilities {self.sm}"


def parse_architectures(text: str) -> tuple[int, ...]:
    """`"86,89"` -> (86, 89).

    Raises:
        InputError: not a list of known compute capabilities.
    """
    try:
        architectures = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise InputError(f"--sm {text!r} is not a list of numbers; write --sm 86,89,120") from error
    for number in architectures:
        if number not in ARCHITECTURES:
            known = ", ".join(map(str, ARCHITECTURES))
            raise InputError(f"--sm {number} is not supported by target tensorrt-rtx; choose from {known}")
    return architectures
