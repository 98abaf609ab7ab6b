"""The target `tensorrt-llm`: the vision graph as a TensorRT engine; TensorRT-LLM runs the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from vtexport.errors import InputError
from vtexport.targets.base import Compiled, CompileJob
from vtexport.targets.tensorrt.full import TensorRTTarget

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtexport.models.spec import ModelSpec
    from vtexport.pruning import PruningPlan
    from vtexport.targets.tensorrt.engine import TensorRTEngine
    from vtexport.targets.tensorrt.target import Shapes

_FLOWS = ("pytorch", "engine")


class TensorRTLLMTarget(TensorRTTarget):
    """A vision engine for TensorRT-LLM.

    Flow `pytorch` is for its PyTorch backend, whose prompts `vtexport.targets.tensorrt_llm.prompts` makes. Flow `engine` is
    the layout that its engine flow (up to 1.2) opens by itself: `vision/model.engine` and `vision/config.json`, and a
    script that builds the language model to match.
    """

    name: ClassVar[str] = "tensorrt-llm"
    summary: ClassVar[str] = "TensorRT-LLM: a pruned vision engine before its own language model"
    vision_only: ClassVar[bool] = True
    dtypes: ClassVar[tuple[str, ...]] = ("fp16", "fp32")
    # The language model, and how its weights are held, is TensorRT-LLM's.
    options: ClassVar[Mapping[str, str | int]] = {
        **{name: value for name, value in TensorRTTarget.options.items() if name != "quantize"},
        "flow": "pytorch",
    }

    def check_options(self, options: Mapping[str, str | int]) -> None:
        if options["flow"] not in _FLOWS:
            raise InputError(f"--flow {options['flow']} is unknown; choose one of {', '.join(_FLOWS)}")
        if options["flow"] == "engine" and options["plugins"]:
            raise InputError("--flow engine: TensorRT-LLM's own runner loads no plugins of ours; add --no-plugins")
        if options["flow"] == "engine" and options["strip_weights"]:
            raise InputError("--flow engine: TensorRT-LLM's own runner puts no weights back; leave --strip-weights out")
        super().check_options(options)

    def check_plans(self, spec: ModelSpec, plans: Sequence[PruningPlan], options: Mapping[str, str | int]) -> None:
        if plans[0].decoder_stages:
            raise InputError(
                f"method {plans[0].method} prunes inside the decoder, which TensorRT-LLM runs itself; use a vision-stage "
                "method such as fastervlm, or target tensorrt, tensorrt-rtx or onnxruntime"
            )
        if options["flow"] == "engine" and (len(plans) > 1 or spec.views.total > 1 or spec.clip is not None):
            raise InputError(
                "--flow engine gives the vision engine one view and no question, and takes one count of tokens; use "
                "--flow pytorch for this build"
            )

    def compile(self, job: CompileJob) -> Compiled:
        if job.options["flow"] == "pytorch":
            return super().compile(job)
        from vtexport.targets.tensorrt_llm import layout

        (job.folder / layout.ENGINE).parent.mkdir()
        compiled = super().compile(job)
        layout.write_layout(job)
        return compiled

    def plan_file(self, name: str, options: Mapping[str, str | int]) -> str:
        if options["flow"] == "pytorch":
            return super().plan_file(name, options)
        from vtexport.targets.tensorrt_llm.layout import ENGINE

        return ENGINE

    def parsed(self, model: ir.Model, shapes: Shapes, job: CompileJob) -> tuple[ir.Model, Shapes]:
        if job.options["flow"] == "pytorch":
            return super().parsed(model, shapes, job)
        from vtexport.targets.tensorrt_llm.layout import INPUT, renamed

        return renamed(model, job.dtype), {INPUT: shapes["pixel_values"]}

    def facts(self, options: Mapping[str, str | int]) -> dict[str, str | int]:
        return {**super().facts(options), "flow": str(options["flow"])}

    def engine(self, compiled: Compiled) -> type[TensorRTEngine]:
        if compiled.facts["flow"] == "pytorch":
            return super().engine(compiled)
        from vtexport.targets.tensorrt_llm.layout import EngineFlowVision

        return EngineFlowVision
