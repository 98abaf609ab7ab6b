"""The target `onnxruntime`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vtexport.targets.base import ENGINE_FOLDER, Availability, Compiled, CompileJob, Engine

if TYPE_CHECKING:
    from vtexport.models.spec import ModelSpec
    from vtexport.pruning import PruningPlan
    from vtexport.targets.quantize import Scheme


class OnnxRuntimeTarget:
    """ONNX graphs with ONNX Runtime's fused kernels; weights in safetensors files beside them."""

    name: ClassVar[str] = "onnxruntime"
    summary: ClassVar[str] = "ONNX Runtime on the CPU"
    weights_inside: ClassVar[bool] = False
    vision_only: ClassVar[bool] = False
    dtypes: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    options: ClassVar[Mapping[str, str | int]] = {"quantize": ""}

    def can_build(self) -> Availability:
        return self.can_run()

    def can_run(self) -> Availability:
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, "onnxruntime is not installed; install it with: pip install onnxruntime")
        from importlib.metadata import version

        return Availability(True, f"onnxruntime {version('onnxruntime')}")

    def check_options(self, options: Mapping[str, str | int]) -> None:
        self.scheme(options)

    def check_plans(self, spec: ModelSpec, plans: Sequence[PruningPlan], options: Mapping[str, str | int]) -> None:
        """Every plan is welcome."""

    def scheme(self, options: Mapping[str, str | int]) -> Scheme | None:
        from vtexport.targets.onnxruntime.quantize import SCHEMES
        from vtexport.targets.quantize import chosen

        return chosen(SCHEMES, options, self.name)

    def compile(self, job: CompileJob) -> Compiled:
        import onnx_ir as ir
        import onnxruntime

        from vtexport.targets.onnxruntime.lowering import LowerToContrib

        files = {}
        for name, model in job.models.items():
            job.report(f"lower {name} to ONNX Runtime's kernels", None)
            LowerToContrib()(model)
            files[name] = f"{ENGINE_FOLDER}/{name}.onnx"
            ir.save(model, job.folder / files[name])
        return Compiled(files, {"onnxruntime": onnxruntime.__version__})

    def finish(self, folder: Path, compiled: Compiled) -> None:
        """Graphs and weights are the bundle."""

    def open(self, folder: Path, compiled: Compiled, threads: int) -> Engine:
        from vtexport.targets.onnxruntime.session import OrtEngine

        return OrtEngine(folder, compiled.files, threads)
