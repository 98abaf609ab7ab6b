"""What all TensorRT targets share: they compile each graph into a plan, and open plans on a GPU."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vtexport.errors import InputError, TargetError
from vtexport.options import Meta, Option
from vtexport.targets.base import ENGINE_FOLDER, Availability, Compiled, CompileJob, Target
from vtexport.targets.engine import Engine
from vtexport.targets.language import LANGUAGE

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtexport.pruning import PruningPlan
    from vtexport.targets.quantize import Scheme
    from vtexport.targets.tensorrt.bindings import Bindings
    from vtexport.targets.tensorrt.builder import Settings
    from vtexport.targets.tensorrt.engine import TensorRTEngine
    from vtexport.targets.tensorrt.profiles import Limits, Profile

#: the option `quantize` of the targets that compile the decoder
Quantize = Annotated[
    Literal["", "int8", "fp8", "int4"],
    Meta(description="Hold the weights of the decoder's linear layers in fewer bits."),
]


@dataclass(frozen=True)
class Device:
    """A GPU: its name and its compute capability, such as 89."""

    name: str
    capability: int


def this_gpu() -> Device | None:
    """The GPU that PyTorch uses here; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Device(torch.cuda.get_device_name(), 10 * major + minor)


@dataclass(frozen=True)
class AnyTensorRT(Target):
    """A plan for vision and one for language, weights inside unless stripped, with profiles over batch and text."""

    dtypes: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")
    #: the module of its Python bindings
    package: ClassVar[str]
    #: whether later versions of TensorRT load its plans
    version_compatible = False

    max_batch: Annotated[int, Meta(ge=1, le=4096, description="Maximum number of prompts per batch.")] = 4
    max_text: Annotated[
        int,
        Meta(
            ge=64,
            le=1 << 20,
            description="Maximum number of text tokens per prompt, and of prompt and answer together.",
        ),
    ] = 512
    strip_weights: Annotated[
        bool, Meta(description="Keep one copy of the weights for all plans, loaded into them when a bundle is opened.")
    ] = False

    @abstractmethod
    def settings(self) -> Settings:
        """The builder's settings according to this target's options."""

    @abstractmethod
    def prepare(self, model: ir.Model) -> None:
        """Change `model` into what this TensorRT's parser takes."""

    @abstractmethod
    def check_gpu(self, gpu: Device, compiled: Compiled) -> str | None:
        """Why `gpu` cannot run what was compiled; None if it can."""

    def parsed(self, model: ir.Model, profiles: list[Profile], job: CompileJob) -> tuple[ir.Model, list[Profile]]:
        """The graph that TensorRT parses, made of a copy of the traced one, and its profiles."""
        self.prepare(model)
        return model, profiles

    def plan_file(self, name: str) -> str:
        """Where the plan of graph `name` goes, from the bundle's folder."""
        return f"{ENGINE_FOLDER}/{name}.plan"

    def engine(self) -> type[TensorRTEngine]:
        """The class that runs the plans."""
        from vtexport.targets.tensorrt.engine import TensorRTEngine

        return TensorRTEngine

    def facts(self) -> dict[str, Option]:
        """The facts about this machine that a plan depends on, for the manifest."""
        return {}

    def plugin_library(self, folder: Path) -> Path | None:
        """The library of plugins, put into the bundle `folder`, that graphs are compiled with; None for none."""
        return None

    def load(self, folder: Path, compiled: Compiled) -> None:
        """Do what is necessary before the first plan is opened."""

    @classmethod
    def bindings(cls) -> Bindings:
        """TensorRT's Python module."""
        from vtexport.targets.tensorrt.bindings import bindings

        return bindings(cls.package)

    def can_run(self) -> Availability:
        available = self.can_build()
        if not available.works:
            return available
        gpu = this_gpu()
        if gpu is None:
            return Availability(
                False, "no CUDA GPU that PyTorch can use; run on a machine with a GPU and a CUDA build of torch"
            )
        return Availability(True, f"{available.reason} on {gpu.name}")

    @property
    def weights_inside(self) -> bool:
        return True

    @property
    def largest_batch(self) -> int | None:
        return self.max_batch

    @property
    def cache_room(self) -> int | None:
        return self.max_text

    @property
    def limits(self) -> Limits:
        """What plans are built for, and requests held to."""
        from vtexport.targets.tensorrt.profiles import Limits

        return Limits(self.max_batch, self.max_text)

    def check(self) -> None:
        self.settings()
        if self.scheme() is not None and self.strip_weights:
            raise InputError("--strip-weights cannot go with --quantize; leave one of them out")

    def compile(self, job: CompileJob) -> Compiled:
        import onnx_ir as ir

        from vtexport.targets.tensorrt.builder import Build
        from vtexport.targets.tensorrt.child import compile_apart
        from vtexport.targets.tensorrt.profiles import profiles_of

        settings, plugins, files = self.settings(), self.plugin_library(job.folder), {}
        for name, model in job.models.items():
            # The graph as it was traced, for the self-check, and what TensorRT parses.
            ir.save(model, job.folder / ENGINE_FOLDER / f"{name}.onnx")
            parsed, profiles = self.parsed(model.clone(), profiles_of(job, name, self.limits), job)
            source, files[name] = job.folder / parsed_file(name), self.plan_file(name)
            ir.save(parsed, source)
            build = Build(name, profiles, settings, job.report, job.advance, job.warn)
            compile_apart(self.package, plugins, source, job.folder / files[name], build)
        return Compiled(files, {self.name: self.bindings().version}, self.facts())

    def finish(self, folder: Path, compiled: Compiled) -> None:
        kept, engines = {folder / file for file in compiled.files.values()}, folder / ENGINE_FOLDER
        if self.strip_weights:
            sources = {folder / f"{ENGINE_FOLDER}/{name}.onnx" for name in compiled.files}
            kept |= set(engines.iterdir()) - sources
        for source in set(engines.iterdir()) - kept:
            source.unlink()
        if not list(engines.iterdir()):
            engines.rmdir()

    def open(self, folder: Path, compiled: Compiled, plans: Sequence[PruningPlan], threads: int) -> Engine:
        from vtexport.targets.tensorrt.engine import Opening
        from vtexport.targets.tensorrt.plan import Reading

        bindings, gpu = self.bindings(), this_gpu()
        built_with, here = compiled.versions[self.name], bindings.version
        later = self.version_compatible and numbers(here) >= numbers(built_with)
        if built_with != here and not later:
            raise TargetError(
                f"{folder} was built with {self.name} {built_with}, but this machine has {here}; "
                "install that version, or build again"
            )
        refusal = None if gpu is None else self.check_gpu(gpu, compiled)
        if gpu is not None and refusal is not None:
            raise TargetError(f"{folder} {refusal}, not for {gpu.name}; build again for it")
        self.load(folder, compiled)
        if not self.vision_only and set(compiled.files) != {"vision", LANGUAGE}:
            raise TargetError(f"{folder} was built by an older vtexport, with a plan per stage; build it again")
        files = {name: folder / file for name, file in compiled.files.items()}
        readings = {
            # A plan for later versions carries host code, which they must be allowed to run.
            name: Reading(folder / parsed_file(name) if self.strip_weights else None, self.version_compatible)
            for name in files
        }
        opening = Opening(files, readings, plans, self.limits)
        return self.engine()(bindings, opening)


def parsed_file(name: str) -> str:
    """Where the ONNX file lies that TensorRT parses for the plan of graph `name`, from the bundle's folder."""
    return f"{ENGINE_FOLDER}/{name}.parsed.onnx"


def quantize_scheme(kind: str) -> Scheme | None:
    """The scheme for a value of `--quantize`; None leaves weights as they are."""
    from vtexport.targets.tensorrt.quantize import SCHEMES

    return SCHEMES.get(kind)


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare it by."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def inline_functions(model: ir.Model, keep: Any = None) -> None:
    """Replace function calls by bodies that TensorRT fuses; functions of domain `keep` stay calls and lose their bodies.

    Inlining here gives every node a unique name, while TensorRT's parser would repeat the names in each body. A call
    without a body can only be a plugin; with one, TensorRT's versions differ on whether the body or the plugin wins.
    """
    from onnx_ir.passes.common import InlinePass

    from vtexport.targets.tensorrt.attention import lower_attention

    lower_attention(model)
    if keep is None:
        InlinePass()(model)
        return
    InlinePass(criteria=lambda function: function.domain != keep)(model)
    for identifier in [key for key in model.functions if key[0] == keep]:
        del model.functions[identifier]
