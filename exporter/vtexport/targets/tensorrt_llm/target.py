"""The target `tensorrt-llm`: LLaVA for TensorRT-LLM, which runs the language model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from vtexport.errors import InputError
from vtexport.options import Meta, flag_of, option_fields
from vtexport.targets.base import ENGINE_FOLDER, Availability, Compiled, CompileJob
from vtexport.targets.engine import Engine
from vtexport.targets.tensorrt.full import FullTensorRT

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtexport.models.spec import ModelSpec
    from vtexport.pruning import PruningPlan
    from vtexport.targets.tensorrt.engine import TensorRTEngine
    from vtexport.targets.tensorrt.profiles import Profile


@dataclass(frozen=True)
class TensorRTLLMTarget(FullTensorRT):
    """LLaVA for TensorRT-LLM.

    Flow `pytorch` is for its PyTorch backend: the bundle registers a LLaVA of vtexport's there, which prunes in the
    vision stage and inside the decoder (`torch_model`), and makes visual tokens for it or for TensorRT-LLM's own models
    (`prompts`). Flow `select` approximates a decoder-stage method for a TensorRT-LLM that loads no model of ours: the
    first decoder layers run here and only choose visual tokens, whose embeddings TensorRT-LLM's own model gets. Flow
    `engine` is the layout that its engine flow (up to 1.2) opens by itself: `vision/model.engine` and
    `vision/config.json`, with a script that builds the matching language model.
    """

    name: ClassVar[str] = "tensorrt-llm"
    summary: ClassVar[str] = "TensorRT-LLM: a LLaVA that prunes, for its PyTorch backend, or a pruned vision engine"
    vision_only: ClassVar[bool] = True
    dtypes: ClassVar[tuple[str, ...]] = ("fp16", "fp32")

    flow: Annotated[
        Literal["pytorch", "select", "engine"],
        Meta(
            description="pytorch registers a LLaVA that prunes with TensorRT-LLM's PyTorch backend; select only chooses "
            "tokens for its own models, which costs accuracy; engine is the layout of its engine flow (up to 1.2)."
        ),
    ] = "pytorch"
    vision_runtime: Annotated[
        Literal["auto", "torch", "tensorrt"],
        Meta(
            description="What runs the bundle's vision stage: PyTorch, or a TensorRT plan built on this GPU. auto is "
            "torch, and tensorrt with --flow engine.",
        ),
    ] = "auto"

    @property
    def on_torch(self) -> bool:
        """Whether PyTorch runs what the bundle computes."""
        return self.vision_runtime == "torch" or (self.vision_runtime == "auto" and self.flow != "engine")

    @property
    def weights_inside(self) -> bool:
        return not self.on_torch

    @property
    def selects(self) -> bool:
        return self.flow == "select"

    @property
    def largest_batch(self) -> int | None:
        return None if self.on_torch else self.max_batch

    def can_build(self) -> Availability:
        return Availability(True, "PyTorch") if self.on_torch else super().can_build()

    def can_run(self) -> Availability:
        return Availability(True, "PyTorch") if self.on_torch else super().can_run()

    def check_given(self, given: Collection[str]) -> None:
        if not self.on_torch:
            return
        for name in option_fields(FullTensorRT):
            if name in given:
                raise InputError(
                    f"{flag_of(name)} is an option of TensorRT, and PyTorch runs this bundle's vision stage; leave it out, "
                    "or add --vision-runtime tensorrt"
                )

    def check(self) -> None:
        if self.flow == "select" and not self.on_torch:
            raise InputError("--flow select runs through PyTorch; leave --vision-runtime tensorrt out")
        if self.flow == "engine" and self.on_torch:
            raise InputError("--flow engine needs a TensorRT plan; leave --vision-runtime torch out")
        if self.flow == "engine" and self.plugins:
            raise InputError("--flow engine: TensorRT-LLM's own runner loads no plugins of ours; add --no-plugins")
        if self.flow == "engine" and self.strip_weights:
            raise InputError("--flow engine: TensorRT-LLM's own runner puts no weights back; leave --strip-weights out")
        if not self.on_torch:
            super().check()

    def planned(self, plans: Sequence[PruningPlan]) -> Sequence[PruningPlan]:
        if self.flow != "select":
            return plans
        from vtexport.pruning.selection import selection_plan

        if len(plans) > 1:
            raise InputError("--keep auto cannot go with --flow select, which has one number of tokens; give a ratio")
        return [selection_plan(plans[0])]

    def check_plans(self, spec: ModelSpec, plans: Sequence[PruningPlan]) -> None:
        from vtexport.targets.tensorrt_llm.deployment import check_deployed, check_selected

        if self.flow != "engine":
            (check_deployed if self.flow == "pytorch" else check_selected)(spec, plans)
            return
        if plans[0].decoder_stages:
            raise InputError(
                f"method {plans[0].method} prunes inside the decoder, which --flow engine leaves to TensorRT-LLM; use "
                "--flow pytorch, or a vision-stage method such as fastervlm"
            )
        if spec.family != "llava":
            raise InputError(f"--flow engine is for model_type llava, not {spec.family}; use --flow pytorch")
        if len(plans) > 1 or spec.views.total > 1 or spec.clip is not None:
            raise InputError(
                "--flow engine takes one view, no question and a fixed number of visual tokens; use --flow pytorch for "
                "this build"
            )

    def compile(self, job: CompileJob) -> Compiled:
        if self.flow == "engine":
            from vtexport.targets.tensorrt_llm import layout

            (job.folder / layout.ENGINE).parent.mkdir()
            compiled = super().compile(job)
            layout.write_layout(job, self.max_batch, self.max_text)
            return compiled
        from vtexport.targets.tensorrt_llm.deployment import write_deployment, write_description

        (write_deployment if self.flow == "pytorch" else write_description)(job)
        return self._kept(job) if self.on_torch else super().compile(job)

    def _kept(self, job: CompileJob) -> Compiled:
        """The graph as it was traced; PyTorch runs the module that it was traced from."""
        import onnx_ir as ir
        import torch

        files = {}
        for name, model in job.models.items():
            files[name] = f"{ENGINE_FOLDER}/{name}.onnx"
            ir.save(model, job.folder / files[name])
        return Compiled(files, {"torch": str(torch.__version__)})

    def finish(self, folder: Path, compiled: Compiled) -> None:
        if not self.on_torch:
            super().finish(folder, compiled)

    def open(self, folder: Path, compiled: Compiled, plans: Sequence[PruningPlan], threads: int) -> Engine:
        if not self.on_torch:
            return super().open(folder, compiled, plans, threads)
        from vtexport.targets.tensorrt_llm.torch_engine import TorchEngine

        return TorchEngine(folder, list(compiled.files), threads)

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
