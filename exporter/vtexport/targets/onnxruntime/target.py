"""The target `onnxruntime`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from vtexport.options import Meta
from vtexport.targets.base import ENGINE_FOLDER, Availability, Compiled, CompileJob, Target
from vtexport.targets.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtexport.pruning import PruningPlan
    from vtexport.targets.quantize import Scheme


@dataclass(frozen=True)
class OnnxRuntimeTarget(Target):
    """ONNX graphs with ONNX Runtime's fused kernels; weights in safetensors files beside them."""

    name: ClassVar[str] = "onnxruntime"
    summary: ClassVar[str] = "ONNX Runtime on the CPU"
    dtypes: ClassVar[tuple[str, ...]] = ("fp32", "fp16")

    quantize: Annotated[
        Literal["", "int8", "int4"], Meta(description="Hold the weights of the decoder's linear layers in fewer bits.")
    ] = ""

    def can_build(self) -> Availability:
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, "onnxruntime is not installed; install it with: pip install onnxruntime")
        from importlib.metadata import version

        return Availability(True, f"onnxruntime {version('onnxruntime')}")

    def scheme(self) -> Scheme | None:
        from vtexport.targets.onnxruntime.quantize import SCHEMES

        return SCHEMES.get(self.quantize)

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
        self._warn_if_slow(job)
        return Compiled(files, {"onnxruntime": onnxruntime.__version__})

    def _warn_if_slow(self, job: CompileJob) -> None:
        scheme = self.scheme()
        if scheme is None:
            return
        import onnx_ir as ir

        from vtexport.targets.onnxruntime import speed

        job.report("time quantised weights", None)
        size = job.spec.decoder
        dtype = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}[job.dtype]
        text = speed.measure(scheme, size.intermediate_size, size.hidden_size, dtype).warning(self.quantize, job.dtype)
        if text is not None:
            job.warn(text)

    def open(self, folder: Path, compiled: Compiled, plans: Sequence[PruningPlan], threads: int) -> Engine:
        from vtexport.targets.onnxruntime.session import OrtEngine

        return OrtEngine(folder, compiled.files, plans, threads)

    def open_exact(self, folder: Path, compiled: Compiled, plans: Sequence[PruningPlan]) -> Engine:
        from vtexport.targets.onnxruntime.session import OrtEngine

        return OrtEngine(folder, compiled.files, plans, exact=True)
