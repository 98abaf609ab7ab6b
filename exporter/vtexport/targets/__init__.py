"""The runtimes vtexport compiles for; one folder each."""

from __future__ import annotations

from vtexport.errors import InputError
from vtexport.targets.base import Target
from vtexport.targets.onnxruntime.target import OnnxRuntimeTarget
from vtexport.targets.tensorrt.full import TensorRTTarget
from vtexport.targets.tensorrt.rtx import TensorRTRTXTarget
from vtexport.targets.tensorrt_llm.target import TensorRTLLMTarget

TARGETS: dict[str, Target] = {
    target.name: target for target in (OnnxRuntimeTarget(), TensorRTRTXTarget(), TensorRTTarget(), TensorRTLLMTarget())
}
DEFAULT_TARGET = OnnxRuntimeTarget.name

__all__ = ["DEFAULT_TARGET", "TARGETS", "Target", "get_target"]


def get_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        InputError: there is none; the message names those there are.
    """
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]
