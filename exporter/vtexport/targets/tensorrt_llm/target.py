"""The target `tensorrt-llm`: the vision graph as a TensorRT engine; TensorRT-LLM runs the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from vtexport.errors import InputError
from vtexport.options import Meta
from vtexport.targets.base import Compiled, CompileJob
from vtexport.targets.tensorrt.full import FullTensorRT

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtexport.models.spec import ModelSpec
    from vtexport.pruning import PruningPlan
    from vtexport.targets.tensorrt.engine import TensorRTEngine
    from vtexport.targets.tensorrt.profiles import Profile


@dataclass(frozen=True)
class TensorRTLLMTarget(FullTensorRT):
    """A vision engine for TensorRT-LLM.

    Flow `pytorch` is for its PyTorch backend, with prompts from `vtexport.targets.tensorrt_llm.prompts`. Flow `engine`
    is the layout that its engine flow (up to 1.2) opens by itself: `vision/model.engine` and `vision/config.json`, with
    a script that builds the matching language model.
    """

    name: ClassVar[str] = "tensorrt-llm"
    summary: ClassVar[str] = "TensorRT-LLM: a pruned vision engine before its own language model"
    vision_only: ClassVar[bool] = True
    dtypes: ClassVar[tuple[str, ...]] = ("fp16", "fp32")

    flow: Annotated[
        Literal["pytorch", "engine"],
        Meta(description="For TensorRT-LLM's PyTorch backend, or in the layout of its engine flow (up to 1.2)."),
    ] = "pytorch"

    def check(self) -> None:
        if self.flow == "engine" and self.plugins:
            raise InputError("--flow engine: TensorRT-LLM's own runner loads no plugins of ours; add --no-plugins")
        if self.flow == "engine" and self.strip_weights:
            raise InputError("--flow engine: TensorRT-LLM's own runner puts no weights back; leave --strip-weights out")
        super().check()

    def check_plans(self, spec: ModelSpec, plans: Sequence[PruningPlan]) -> None:
        if plans[0].decoder_stages:
            raise InputError(
                f"method {plans[0].method} prunes inside the decoder, which TensorRT-LLM runs itself; use a vision-stage "
                "method such as fastervlm, or target tensorrt, tensorrt-rtx or onnxruntime"
            )
        if self.flow == "engine" and (len(plans) > 1 or spec.views.total > 1 or spec.clip is not None):
            raise InputError(
                "--flow engine takes one view, no question and a fixed number of visual tokens; use --flow pytorch for "
                "this build"
            )

    def compile(self, job: CompileJob) -> Compiled:
        if self.flow == "pytorch":
            return super().compile(job)
        from vtexport.targets.tensorrt_llm import layout

        (job.folder / layout.ENGINE).parent.mkdir()
        compiled = super().compile(job)
        layout.write_layout(job, self.max_batch, self.max_text)
        return compiled

    def plan_file(self, name: str) -> str:
        if self.flow == "pytorch":
            return super().plan_file(name)
        from vtexport.targets.tensorrt_llm.layout import ENGINE

        return ENGINE

    def parsed(self, model: ir.Model, profiles: list[Profile], job: CompileJob) -> tuple[ir.Model, list[Profile]]:
        model, profiles = super().parsed(model, profiles, job)
        if self.flow == "pytorch":
            return model, profiles
        from vtexport.targets.tensorrt_llm.layout import INPUT, renamed

        return renamed(model, job.dtype), [{INPUT: profiles[0]["pixel_values"]}]

    def engine(self) -> type[TensorRTEngine]:
        if self.flow == "pytorch":
            return super().engine()
        from vtexport.targets.tensorrt_llm.layout import EngineFlowVision

        return EngineFlowVision
