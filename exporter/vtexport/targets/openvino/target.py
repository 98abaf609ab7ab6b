"""The target `openvino`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from vtexport.errors import InputError, TargetError
from vtexport.options import Meta
from vtexport.targets.base import ENGINE_FOLDER, Availability, Compiled, CompileJob, Target
from vtexport.targets.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtexport.pruning import PruningPlan
    from vtexport.targets.quantize import Scheme


@dataclass(frozen=True)
class OpenVinoTarget(Target):
    """ONNX graphs that OpenVINO reads when a bundle is opened; weights in safetensors files beside them."""

    name: ClassVar[str] = "openvino"
    summary: ClassVar[str] = "OpenVINO on Intel's CPUs, GPUs and NPUs"
    dtypes: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16")

    device: Annotated[
        str,
        Meta(description="OpenVINO's device: CPU, GPU, NPU, or one of several as GPU.1.", extra={"metavar": "NAME"}),
    ] = "CPU"
    quantize: Annotated[
        Literal["", "int8", "int4"], Meta(description="Hold the weights of the decoder's linear layers in fewer bits.")
    ] = ""

    def can_build(self) -> Availability:
        if importlib.util.find_spec("openvino") is None:
            return Availability(False, "OpenVINO is not installed; install it with: pip install 'vtexport[openvino]'")
        from importlib.metadata import version

        return Availability(True, f"OpenVINO {version('openvino')}")

    def can_run(self) -> Availability:
        available = self.can_build()
        if not available.works:
            return available
        from vtexport.targets.openvino.settings import devices, has_device

        if not has_device(self.device):
            known = ", ".join(devices()) or "none"
            return Availability(
                False,
                f"OpenVINO has no device {self.device} here, of devices {known}; build again with --device for one",
            )
        return Availability(True, f"{available.reason} on {self.device}")

    def check(self) -> None:
        from vtexport.targets.openvino.settings import devices, has_device

        if not has_device(self.device):
            known = ", ".join(devices()) or "none"
            raise InputError(f"--device {self.device}: OpenVINO has no such device here; choose from {known}")

    def scheme(self) -> Scheme | None:
        from vtexport.targets.openvino.quantize import SCHEMES

        return SCHEMES.get(self.quantize)

    def compile(self, job: CompileJob) -> Compiled:
        from importlib.metadata import version

        import onnx_ir as ir

        from vtexport.targets.openvino.lowering import lower
        from vtexport.targets.openvino.settings import computes_in

        if computes_in(self.device, job.dtype) != job.dtype:
            job.warn(
                f"{self.device} of this machine does not compute in {job.dtype}: OpenVINO converts weights to fp32 "
                "when it opens this bundle here"
            )
        files = {}
        for name, model in job.models.items():
            job.report(f"lower {name} to what OpenVINO reads", None)
            lower(model)
            files[name] = f"{ENGINE_FOLDER}/{name}.onnx"
            ir.save(model, job.folder / files[name])
        return Compiled(files, {self.name: version("openvino")}, {"dtype": job.dtype})

    def open(self, folder: Path, compiled: Compiled, plans: Sequence[PruningPlan], threads: int) -> Engine:
        return self._open(folder, compiled, plans, threads, rounds=bool(self.quantize))

    def open_exact(self, folder: Path, compiled: Compiled, plans: Sequence[PruningPlan]) -> Engine:
        return self._open(folder, compiled, plans, 0, rounds=False)

    def _open(
        self, folder: Path, compiled: Compiled, plans: Sequence[PruningPlan], threads: int, rounds: bool
    ) -> Engine:
        available = self.can_run()
        if not available.works:
            raise TargetError(f"{folder} cannot run here: {available.reason}")
        from vtexport.targets.openvino.engine import Opening, OpenVinoEngine
        from vtexport.targets.openvino.settings import config

        files = {name: folder / file for name, file in compiled.files.items()}
        settings = config(self.device, str(compiled.facts["dtype"]), threads, rounds)
        return OpenVinoEngine(Opening(files, plans, self.device, settings))
