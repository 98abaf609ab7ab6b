"""The target `tensorrt`: TensorRT 10.13 to 11.x, with the pruning ops as plugins.

Written against the documented API, whose names vtexport's tests hold against TensorRT's own Python bindings; no test
machine has had a GPU with TensorRT, so no plan of this target was ever built or run by us.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vtexport.errors import InputError
from vtexport.native import plugins
from vtexport.targets.base import Availability, Compiled
from vtexport.targets.tensorrt.target import OPTIONS, AnyTensorRT, Device, inline_functions, this_gpu

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtexport.targets.tensorrt.builder import Settings

#: option -> TensorRT's name, and which GPUs then run the plan
HARDWARE = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-sm": "SAME_COMPUTE_CAPABILITY"}
PLUGINS_FOLDER = "plugins"


class TensorRTTarget(AnyTensorRT):
    """Full TensorRT, which measures kernels on the GPU that it builds for."""

    name: ClassVar[str] = "tensorrt"
    summary: ClassVar[str] = "TensorRT with vtexport's plugins: built on the GPU that it runs on"
    package: ClassVar[str] = "tensorrt"
    options: ClassVar[Mapping[str, str | int]] = {
        **OPTIONS,
        "plugins": 1,
        "version_compatible": 0,
        "hardware_compatible": "none",
        "timing_cache": "",
    }

    def can_build(self) -> Availability:
        if importlib.util.find_spec(self.package) is None:
            return Availability(False, "TensorRT is not installed; install it with: pip install tensorrt-cu13")
        gpu = this_gpu()
        if gpu is None:
            return Availability(
                False,
                "TensorRT builds on the GPU that it builds for, and PyTorch can use none here; "
                "run on a machine with one, or choose --target tensorrt-rtx",
            )
        version = self.bindings().version
        if int(version.split(".", maxsplit=1)[0]) < 10:
            return Availability(False, f"TensorRT {version} is too old; install 10.13 or later")
        return Availability(True, f"TensorRT {version}")

    def settings(self, options: Mapping[str, str | int]) -> Settings:
        from vtexport.targets.tensorrt.builder import Settings

        hardware, cache = str(options["hardware_compatible"]), str(options["timing_cache"])
        if hardware not in HARDWARE:
            raise InputError(f"--hardware-compatible {hardware} is unknown; choose one of {', '.join(HARDWARE)}")
        if cache and not Path(cache).absolute().parent.is_dir():
            raise InputError(f"--timing-cache {cache}: its folder is missing; make it, or give another file")
        if options["plugins"] and plugins.library() is None:
            raise InputError(
                f"{plugins.LIBRARY} is not installed; install vtexport from source with nvcc and TENSORRT_ROOT set, "
                "or leave the pruning ops to TensorRT with --no-plugins"
            )
        return Settings(
            version_compatible=bool(options["version_compatible"]),
            hardware=HARDWARE[hardware],
            strip_weights=bool(options["strip_weights"]),
            timing_cache=Path(cache) if cache else None,
        )

    def before(self, folder: Path, options: Mapping[str, str | int]) -> None:
        """Register the plugins, and put their library into the bundle."""
        found = plugins.library()
        if options["plugins"] and found is not None:
            (folder / PLUGINS_FOLDER).mkdir()
            shutil.copyfile(found, folder / PLUGINS_FOLDER / plugins.LIBRARY)
            plugins.load(self.bindings().trt.get_plugin_registry(), found)

    def prepare(self, model: ir.Model, options: Mapping[str, str | int]) -> None:
        from vtexport.pruning.onnx_node import DOMAIN_VERSION, PRUNING

        if not options["plugins"]:
            inline_functions(model)
            return
        inline_functions(model, keep=PRUNING)
        for node in model.graph.all_nodes():
            if node.domain == PRUNING:
                # By these the parser knows a plugin's node, whatever its version.
                node.attributes.add(_string("plugin_version", str(DOMAIN_VERSION)))
                node.attributes.add(_string("plugin_namespace", ""))

    def facts(self, options: Mapping[str, str | int]) -> dict[str, str | int]:
        gpu = this_gpu()
        known: dict[str, str | int] = {} if gpu is None else {"gpu": gpu.name, "sm": gpu.capability}
        given = {name: options[name] for name in ("plugins", "version_compatible", "hardware_compatible")}
        return {**known, **given, **super().facts(options)}

    def load(self, folder: Path, compiled: Compiled) -> None:
        """Register the plugins that the bundle carries."""
        if compiled.facts["plugins"]:
            plugins.load(self.bindings().trt.get_plugin_registry(), folder / PLUGINS_FOLDER / plugins.LIBRARY)

    def check_gpu(self, gpu: Device, compiled: Compiled) -> str | None:
        built, level = int(compiled.facts["sm"]), compiled.facts["hardware_compatible"]
        if gpu.capability == built or (level == "ampere+" and gpu.capability >= 80):
            return None
        return f"was built for compute capability {built}"


def _string(name: str, value: str) -> ir.Attr:
    import onnx_ir as ir

    return ir.AttrString(name, value)
