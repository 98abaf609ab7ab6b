"""The runtimes vtexport compiles for; one folder each."""

from __future__ import annotations

from collections.abc import Mapping

from vtexport.errors import InputError
from vtexport.options import parse_options
from vtexport.targets.base import Target
from vtexport.targets.onnxruntime.target import OnnxRuntimeTarget
from vtexport.targets.openvino.target import OpenVinoTarget
from vtexport.targets.tensorrt.full import TensorRTTarget
from vtexport.targets.tensorrt.rtx import TensorRTRTXTarget
from vtexport.targets.tensorrt_llm.target import TensorRTLLMTarget

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (OnnxRuntimeTarget, OpenVinoTarget, TensorRTRTXTarget, TensorRTTarget, TensorRTLLMTarget)
}
DEFAULT_TARGET = OnnxRuntimeTarget.name

__all__ = ["DEFAULT_TARGET", "TARGETS", "Target", "get_target"]


def get_target(name: str, options: Mapping[str, object] | None = None) -> Target:
    """The target called `name` with the options given, the others at their defaults.

    Raises:
        InputError: an unknown target, an option that it does not have, or an invalid value.
    """
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}; choose one of {', '.join(TARGETS)}")
    return parse_options(TARGETS[name], options or {}, f"target {name}")
