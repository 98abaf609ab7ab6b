"""The target `tensorrt-rtx`: TensorRT plans built ahead of time, on any machine, for RTX GPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from vtexport.errors import InputError
from vtexport.targets.base import Availability, Compiled
from vtexport.targets.tensorrt.target import OPTIONS, AnyTensorRT, Device, inline_functions, this_gpu

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtexport.targets.tensorrt.builder import Settings

#: compute capabilities to compile for; TensorRT for RTX also knows 75, but has no fp32 matmul there, and scores
#: are fp32 on every target so that every target keeps the same tokens
ARCHITECTURES = (80, 86, 89, 120, 121)


class TensorRTRTXTarget(AnyTensorRT):
    """TensorRT for RTX. Pruning runs as the ops' function bodies: its parser ends the process at a plugin's node."""

    name: ClassVar[str] = "tensorrt-rtx"
    summary: ClassVar[str] = "TensorRT for RTX: built without a GPU, runs on RTX GPUs"
    package: ClassVar[str] = "tensorrt_rtx_bindings"
    options: ClassVar[Mapping[str, str | int]] = {"sm": "86,89,120", **OPTIONS}

    def can_build(self) -> Availability:
        for module in ("tensorrt_rtx_bindings", "tensorrt_rtx_libs"):
            if importlib.util.find_spec(module) is None:
                return Availability(
                    False,
                    "TensorRT for RTX is not installed; install it with: pip install 'vtexport[tensorrt-rtx]'",
                )
        from importlib.metadata import version

        return Availability(True, f"TensorRT for RTX {version('tensorrt-rtx-cu13-bindings')}")

    def settings(self, options: Mapping[str, str | int]) -> Settings:
        from vtexport.targets.tensorrt.builder import Settings

        if options["strip_weights"] and this_gpu() is None:
            # TensorRT for RTX 1.7.1 fails to build even a single MatMul so.
            raise InputError(
                "--strip-weights works on a machine with a GPU only with target tensorrt-rtx; leave it out"
            )
        return Settings(
            architectures=parse_architectures(str(options["sm"])), strip_weights=bool(options["strip_weights"])
        )

    def prepare(self, model: ir.Model, options: Mapping[str, str | int]) -> None:
        inline_functions(model)

    def facts(self, options: Mapping[str, str | int]) -> dict[str, str | int]:
        return {"sm": str(options["sm"]), **super().facts(options)}

    def check_gpu(self, gpu: Device, compiled: Compiled) -> str | None:
        built = str(compiled.facts["sm"])
        return None if gpu.capability in parse_architectures(built) else f"was built for compute capabilities {built}"


def parse_architectures(text: str) -> tuple[int, ...]:
    """`"86,89"` -> (86, 89).

    Raises:
        InputError: not a list of known compute capabilities.
    """
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise InputError(f"--sm {text!r} is not a list of numbers; write --sm 86,89,120") from error
    for number in found:
        if number not in ARCHITECTURES:
            known = ", ".join(map(str, ARCHITECTURES))
            raise InputError(f"--sm {number} is not supported by target tensorrt-rtx; choose from {known}")
    return found
