"""What both TensorRT targets do alike: compile each graph into a plan, and open plans on a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vtexport.errors import InputError, TargetError
from vtexport.targets.base import ENGINE_FOLDER, Availability, Compiled, CompileJob, Engine

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtexport.models.spec import ModelSpec
    from vtexport.pruning import PruningPlan
    from vtexport.targets.quantize import Scheme
    from vtexport.targets.tensorrt.bindings import Bindings
    from vtexport.targets.tensorrt.builder import Settings
    from vtexport.targets.tensorrt.engine import TensorRTEngine

#: input -> its smallest, usual and largest shape
Shapes = Mapping[str, tuple[Any, Any, Any]]
#: options of every TensorRT target
OPTIONS: Mapping[str, str | int] = {"max_batch": 4, "max_text": 512, "strip_weights": 0, "quantize": ""}


@dataclass(frozen=True)
class Device:
    """A GPU: its name and its compute capability, such as 89."""

    name: str
    capability: int


def this_gpu() -> Device | None:
    """The GPU that PyTorch uses here, None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Device(torch.cuda.get_device_name(), 10 * major + minor)


class AnyTensorRT(ABC):
    """One plan a graph, weights inside unless stripped, profiles over batch, text and cache length."""

    name: ClassVar[str]
    weights_inside: ClassVar[bool] = True
    vision_only: ClassVar[bool] = False
    dtypes: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")
    #: the module of its Python bindings
    package: ClassVar[str]

    @abstractmethod
    def can_build(self) -> Availability: ...

    @abstractmethod
    def settings(self, options: Mapping[str, str | int]) -> Settings:
        """The builder's settings by this target's options."""

    @abstractmethod
    def prepare(self, model: ir.Model, options: Mapping[str, str | int]) -> None:
        """Change `model` into what this TensorRT's parser takes."""

    @abstractmethod
    def check_gpu(self, gpu: Device, compiled: Compiled) -> str | None:
        """Why `gpu` cannot run what was compiled, None if it can."""

    def parsed(self, model: ir.Model, shapes: Shapes, job: CompileJob) -> tuple[ir.Model, Shapes]:
        """What TensorRT is given to parse, and its profile, where that is not the bundle's own graph."""
        return model, shapes

    def plan_file(self, name: str, options: Mapping[str, str | int]) -> str:
        """Where the plan of graph `name` goes, from the bundle's folder."""
        return f"{ENGINE_FOLDER}/{name}.plan"

    def engine(self, compiled: Compiled) -> type[TensorRTEngine]:
        """What runs the plans."""
        from vtexport.targets.tensorrt.engine import TensorRTEngine

        return TensorRTEngine

    def check_plans(  # noqa: B027 - one of three has something to refuse
        self, spec: ModelSpec, plans: Sequence[PruningPlan], options: Mapping[str, str | int]
    ) -> None:
        """Every plan is welcome."""

    def scheme(self, options: Mapping[str, str | int]) -> Scheme | None:
        from vtexport.targets.quantize import chosen
        from vtexport.targets.tensorrt.quantize import SCHEMES

        return chosen(SCHEMES, options, self.name)

    def facts(self, options: Mapping[str, str | int]) -> dict[str, str | int]:
        """What the manifest says of a build with these options."""
        return {"weights": "stripped" if options["strip_weights"] else "inside"}

    def before(self, folder: Path, options: Mapping[str, str | int]) -> None:  # noqa: B027 - one of two needs nothing
        """What must be done before the first graph is parsed."""

    def load(self, folder: Path, compiled: Compiled) -> None:  # noqa: B027 - as above
        """What must be done before the first plan is opened."""

    def bindings(self) -> Bindings:
        from vtexport.targets.tensorrt.bindings import bindings

        return bindings(self.package)

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

    def check_options(self, options: Mapping[str, str | int]) -> None:
        self.settings(options)
        for name in ("max_batch", "max_text"):
            if int(options[name]) < 1:
                raise InputError(f"--{name.replace('_', '-')} {options[name]} is too small; give at least 1")
        if self.scheme(options) is not None and options["strip_weights"]:
            raise InputError("--strip-weights cannot go with --quantize; leave one of them out")

    def compile(self, job: CompileJob) -> Compiled:
        import onnx_ir as ir

        from vtexport.targets.tensorrt.builder import Build, build_plan
        from vtexport.targets.tensorrt.profiles import profile_shapes

        bindings, settings = self.bindings(), self.settings(job.options)
        self.before(job.folder, job.options)
        files = {}
        for name, model in job.models.items():
            source = job.folder / ENGINE_FOLDER / f"{name}.onnx"
            self.prepare(model, job.options)
            ir.save(model, source)
            parsed, shapes = self.parsed(model, profile_shapes(job, name), job)
            if parsed is not model:
                source = source.with_name(f"{name}-parsed.onnx")
                ir.save(parsed, source)
            files[name] = self.plan_file(name, job.options)
            build = Build(name, shapes, settings, job.report, job.advance, job.warn)
            (job.folder / files[name]).write_bytes(build_plan(bindings, source, build))
        return Compiled(files, {self.name: bindings.version}, self.facts(job.options))

    def finish(self, folder: Path, compiled: Compiled) -> None:
        if compiled.facts["weights"] == "stripped":
            return
        plans = {folder / file for file in compiled.files.values()}
        engines = folder / ENGINE_FOLDER
        for source in set(engines.iterdir()) - plans:
            source.unlink()
        if not list(engines.iterdir()):
            engines.rmdir()

    def open(self, folder: Path, compiled: Compiled, threads: int) -> Engine:
        from vtexport.targets.tensorrt.engine import Opening

        bindings, gpu = self.bindings(), this_gpu()
        built_with, here = compiled.versions[self.name], bindings.version
        later = bool(compiled.facts.get("version_compatible")) and _numbers(here) >= _numbers(built_with)
        if built_with != here and not later:
            raise TargetError(
                f"{folder} was built with {self.name} {built_with}, here is {here}; install that one, or build again"
            )
        refusal = None if gpu is None else self.check_gpu(gpu, compiled)
        if gpu is not None and refusal is not None:
            raise TargetError(f"{folder} {refusal}, not for {gpu.name}; build again for it")
        self.load(folder, compiled)
        how = Opening(
            stripped=compiled.facts.get("weights") == "stripped",
            # A plan that later versions load carries code of its own for them to run.
            host_code=bool(compiled.facts.get("version_compatible")),
        )
        return self.engine(compiled)(bindings, {name: folder / file for name, file in compiled.files.items()}, how)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def inline_functions(model: ir.Model, keep: Any = None) -> None:
    """Replace function calls by their bodies, but for functions of domain `keep`, whose bodies go.

    Inlined here, function bodies get node names that are their own; TensorRT's parser would repeat them. Nodes whose
    bodies go can only be plugins: whether a body or a plugin wins differs between TensorRT's versions.
    """
    from onnx_ir.passes.common import InlinePass

    if keep is None:
        InlinePass()(model)
        return
    InlinePass(criteria=lambda function: function.domain != keep)(model)
    for identifier in [one for one in model.functions if one[0] == keep]:
        del model.functions[identifier]
