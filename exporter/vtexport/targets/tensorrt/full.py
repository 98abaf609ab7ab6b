"""The target `tensorrt`: TensorRT 10.15 to 11.x, with the pruning ops as plugins.

Written against the documented API, whose names vtexport's tests check against TensorRT's own Python bindings. No test
machine has had a GPU with TensorRT, so we have never built or run a plan of this target.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from vtexport.errors import InputError
from vtexport.native import plugins
from vtexport.options import Meta, Option
from vtexport.targets.base import Availability, Compiled
from vtexport.targets.tensorrt.target import (
    AnyTensorRT,
    Device,
    Quantize,
    inline_functions,
    numbers,
    quantize_scheme,
    this_gpu,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtexport.targets.quantize import Scheme
    from vtexport.targets.tensorrt.builder import Settings

#: value of `hardware_compatible` -> TensorRT's name of that level
HARDWARE = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-sm": "SAME_COMPUTE_CAPABILITY"}
PLUGINS_FOLDER = "plugins"


@dataclass(frozen=True)
class FullTensorRT(AnyTensorRT):
    """Full TensorRT, which measures kernels on the GPU that it builds for."""

    package: ClassVar[str] = "tensorrt"
    #: the first TensorRT with all that the code and the plugins use
    oldest: ClassVar[tuple[int, int]] = (10, 13)

    plugins: Annotated[bool, Meta(description="Run the pruning ops as vtexport's CUDA plugins.")] = True
    version_compatible: Annotated[bool, Meta(description="Let later TensorRT versions load the plans.")] = False
    hardware_compatible: Annotated[
        Literal["none", "same-sm", "ampere+"], Meta(description="Which other GPUs may run the plans.")
    ] = "none"
    timing_cache: Annotated[
        str,
        Meta(description="File of TensorRT's measurements, read and written back.", extra={"metavar": "FILE"}),
    ] = ""

    def can_build(self) -> Availability:
        if importlib.util.find_spec(self.package) is None:
            return Availability(False, "TensorRT is not installed; install it with: pip install tensorrt-cu13")
        gpu = this_gpu()
        if gpu is None:
            return Availability(
                False,
                "TensorRT builds on the GPU that will run the engines, and PyTorch can use none here; "
                "build on a machine with one, or choose --target tensorrt-rtx",
            )
        version = self.bindings().version
        if numbers(version)[:2] < self.oldest:
            least = ".".join(map(str, self.oldest))
            return Availability(False, f"TensorRT {version} is too old; install {least} or later")
        return Availability(True, f"TensorRT {version}")

    def settings(self) -> Settings:
        from vtexport.targets.tensorrt.builder import Settings

        cache = self.timing_cache
        if cache and not Path(cache).absolute().parent.is_dir():
            raise InputError(f"--timing-cache {cache}: its folder is missing; make it, or give another file")
        if self.plugins and plugins.library() is None:
            raise InputError(
                f"{plugins.LIBRARY} is not installed; install vtexport from source with nvcc and TENSORRT_ROOT set, "
                "or leave the pruning ops to TensorRT with --no-plugins"
            )
        return Settings(
            version_compatible=self.version_compatible,
            hardware=HARDWARE[self.hardware_compatible],
            strip_weights=self.strip_weights,
            timing_cache=Path(cache) if cache else None,
        )

    def plugin_library(self, folder: Path) -> Path | None:
        library = plugins.library()
        if not self.plugins or library is None:
            return None
        (folder / PLUGINS_FOLDER).mkdir()
        return Path(shutil.copyfile(library, folder / PLUGINS_FOLDER / plugins.LIBRARY))

    def prepare(self, model: ir.Model) -> None:
        from vtexport.graph.domains import DOMAIN_VERSION, PRUNING

        if not self.plugins:
            inline_functions(model)
            return
        inline_functions(model, keep=PRUNING)
        for node in model.graph.all_nodes():
            if node.domain == PRUNING:
                # By these the parser of every TensorRT version recognises a plugin's node.
                node.attributes.add(_string("plugin_version", str(DOMAIN_VERSION)))
                node.attributes.add(_string("plugin_namespace", ""))

    def facts(self) -> dict[str, Option]:
        gpu = this_gpu()
        return {} if gpu is None else {"gpu": gpu.name, "sm": gpu.capability}

    def load(self, folder: Path, compiled: Compiled) -> None:
        """Register the plugins that the bundle carries."""
        if self.plugins:
            plugins.load(self.bindings().trt.get_plugin_registry(), folder / PLUGINS_FOLDER / plugins.LIBRARY)

    def check_gpu(self, gpu: Device, compiled: Compiled) -> str | None:
        built = compiled.facts.get("sm")
        if gpu.capability == built or (self.hardware_compatible == "ampere+" and gpu.capability >= 80):
            return None
        return f"was built for compute capability {built}"


@dataclass(frozen=True)
class TensorRTTarget(FullTensorRT):
    """All three graphs on full TensorRT."""

    name: ClassVar[str] = "tensorrt"
    summary: ClassVar[str] = "TensorRT with vtexport's plugins: built on the GPU that it runs on"
    #: the first with KVCacheUpdate, by which the language plan has its caches in place
    oldest: ClassVar[tuple[int, int]] = (10, 15)

    quantize: Quantize = ""

    def scheme(self) -> Scheme | None:
        return quantize_scheme(self.quantize)


def _string(name: str, value: str) -> ir.Attr:
    import onnx_ir as ir

    return ir.AttrString(name, value)
