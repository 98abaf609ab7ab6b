"""The TensorRT plugin library: built for every GPU, driven without one, and loaded into a real registry."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.plugins.conftest import ARCHITECTURES, NEEDS, SOURCE, Built, make
from vtexport.errors import TargetError
from vtexport.graph.domains import DOMAIN_VERSION
from vtexport.graph.pruning_functions import PRUNING_FUNCTIONS
from vtexport.native.plugins import LIBRARY, VERSION, load

pytestmark = NEEDS


def drive(built: Built, driver: str, library: str, *options: str) -> None:
    """Build and run the harness on a library; it says which check fails."""
    make(built.folder.parents[1], driver, library.removeprefix("lib").removesuffix(".so"))
    command = [built.folder / driver, built.folder / library, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all plugins passed"


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_table_of_ops_is_that_of_the_onnx_functions_and_of_the_python_module(built: Built) -> None:
    """Names and order of inputs, attributes and outputs, by which exporters, modules and plugins understand each other."""
    from vtexport import _native

    assert str(DOMAIN_VERSION) == VERSION  # by which TensorRT's parser finds a node's plugin
    make(built.folder.parents[1], "vtexport_drive_plugins_sanitized", "vtexport_plugins_on_cpu")
    command = [
        built.folder / "vtexport_drive_plugins_sanitized",
        built.folder / "libvtexport_plugins_on_cpu.so",
        "--ops",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = [[part.split() for part in line.split("|")] for line in printed.splitlines()]
    functions = [function.to_function_proto() for function in PRUNING_FUNCTIONS]
    assert [(name, inputs, attributes) for (name,), inputs, attributes, _ in table] == [
        (proto.name, list(proto.input), list(proto.attribute)) for proto in functions
    ]
    # Bodies name their outputs as onnxscript does; the module has outputs as arguments behind the inputs.
    assert [len(outputs) for *_, outputs in table] == [len(proto.output) for proto in functions]
    in_module = {"TokenScoreHeads": "token_score", "TokenSelect": "token_select", "TokenRecycle": "token_recycle"}
    for (name,), inputs, attributes, outputs in table:
        if name in in_module:
            signature = getattr(_native.Kernels, in_module[name]).__doc__.splitlines()[0]
            # Lengths of outputs, or numbers, in the module; vectors of such a length as inputs of the op.
            left_out = {*attributes, "count", "keep", "pool", "clusters"}
            arguments = [name for name in re.findall(r"(\w+): ", signature) if name not in left_out]
            assert arguments == [name for name in (*inputs, *outputs) if name not in left_out]


def test_plugins_do_what_tensorrt_asks(built: Built) -> None:
    drive(built, "vtexport_drive_plugins_sanitized", "libvtexport_plugins_on_cpu.so")


# Turing's tensor cores take no bf16; all else is as on the others.
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        (900, ["--fp16"]),
        pytest.param(900, [], marks=pytest.mark.long),
        pytest.param(900, ["--large"], marks=pytest.mark.long),
        pytest.param(750, ["--bf16"], marks=pytest.mark.long),
    ],
)
def test_emulated_kernels_are_their_twins_in_every_order_of_threads(
    built: Built, architecture: int, options: list[str]
) -> None:
    """The CUDA sources themselves, run on the CPU (plugins/tests/emulator)."""
    drive(built, "vtexport_drive_plugins_sanitized", f"libvtexport_plugins_emulated_{architecture}.so", *options)


@pytest.mark.parametrize(
    ("architecture", "place"), [(900, 0), pytest.param(750, 1, marks=pytest.mark.long)], ids=["clusters", "none"]
)
def test_ops_launch_as_many_kernels_as_the_benchmark_expects(
    built: Built, architecture: int, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SOURCE / "benchmarks")
    from kernels import LAUNCHES

    library = f"libvtexport_plugins_emulated_{architecture}.so"
    make(built.folder.parents[1], "vtexport_drive_plugins_sanitized", library.removeprefix("lib").removesuffix(".so"))
    command = [built.folder / "vtexport_drive_plugins_sanitized", built.folder / library, "--launches"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    score, select, recycle = (LAUNCHES[op][place] for op in ("token_score", "token_select", "token_recycle"))
    expected = {"TokenScore": score, "TokenScoreHeads": score, "TokenSelect": select, "TokenRecycle": recycle}
    assert {name: int(number) for name, number in map(str.split, printed.splitlines())} == expected


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["", "memcheck", "racecheck", "initcheck"])
def test_kernels_on_a_gpu_are_their_twins(built: Built, tool: str) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if tool and shutil.which("compute-sanitizer") is None:
        pytest.skip("needs compute-sanitizer")
    make(built.folder.parents[1], "vtexport_drive_plugins")
    watched = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"] if tool else []
    command = [*watched, built.folder / "vtexport_drive_plugins", built.folder / LIBRARY, "--device"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_library_needs_neither_tensorrt_nor_a_cuda_runtime(built: Built) -> None:
    needed = subprocess.run(["ldd", built.folder / LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "libnvinfer" not in needed
    assert "libcudart" not in needed
    command = ["nm", "--dynamic", "--defined-only", built.folder / LIBRARY]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["getCreators", "setLoggerFinder"]


def test_every_gpu_is_compiled_for_and_no_kernel_spills(built: Built) -> None:
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", built.printed)
    assert {int(architecture) for _, architecture in kernels} == set(ARCHITECTURES)
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.printed)
    assert len(usage) == len(kernels) >= 20 * len(ARCHITECTURES)
    assert set(usage) == {("0", "0", "0")}


def test_it_can_be_preloaded_as_triton_has_it(built: Built) -> None:
    code = "import ctypes; every = ctypes.CDLL(None); every.getCreators; every.setLoggerFinder"
    environment = {"LD_PRELOAD": str(built.folder / LIBRARY)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


REGISTER = """
import sys
from pathlib import Path
import tensorrt_rtx_bindings as trt
from vtexport.native.plugins import NAMES, load
registry = trt.get_plugin_registry()
load(registry, Path(sys.argv[1]))
load(registry, Path(sys.argv[1]))
assert sorted(c.name for c in registry.all_creators if c.name in NAMES) == sorted(NAMES)
"""


def test_a_real_registry_takes_it_and_creates_plugins(built: Built) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    create = """
import numpy as np
kinds = {np.int32: trt.PluginFieldType.INT32, np.float32: trt.PluginFieldType.FLOAT32}
values = {"count": (5, np.int32), "scale": (0.3, np.float32), "heads": (2, np.int32), "keep": (3, np.int32),
          "pool": (4, np.int32), "clusters": (2, np.int32), "paper": (0, np.int32)}
for creator in registry.all_creators:
    if creator.name not in NAMES:
        continue
    fields = [trt.PluginField(f.name, np.array([values[f.name][0]], values[f.name][1]), kinds[values[f.name][1]])
              for f in creator.field_names]
    plugin = creator.create_plugin("x", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    assert plugin.get_capability_interface(trt.PluginCapabilityType.CORE).plugin_name == creator.name
    assert not fields or creator.create_plugin("x", trt.PluginFieldCollection(fields[1:]), trt.TensorRTPhase.BUILD) is None
print("created")
"""
    done = run_python(REGISTER + create, built.folder / LIBRARY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "created"


def test_tensorrt_rtx_builds_with_the_plugins_registered(built: Built, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Its parser ends the process at a node that resolves to a plugin; no such node may reach it."""
    pytest.importorskip("tensorrt_rtx_bindings")
    build = """
from vtexport.builder.build import build
from vtexport.builder.options import BuildOptions
bundle = build(BuildOptions(sys.argv[2], 0.5, target="tensorrt-rtx", self_check=False), Path(sys.argv[3]))
print(len(bundle.manifest.target.graphs))
"""
    done = run_python(REGISTER + build, built.folder / LIBRARY, tiny_checkpoint, tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"


def test_plugins_of_another_version_are_refused(tmp_path: Path) -> None:
    class Creator(NamedTuple):
        name: str
        plugin_version: str

    class Registry:
        all_creators = (Creator("SomeoneElses", "1"), Creator("TokenSelect", "1"))

    (tmp_path / LIBRARY).touch()
    message = (
        r"has loaded version 1 of the plugin TokenSelect, and graphs of this vtexport need version 2; load no other"
    )
    with pytest.raises(TargetError, match=message):
        load(Registry(), tmp_path / LIBRARY)


def test_a_missing_library_is_a_clear_error(tmp_path: Path) -> None:
    class Registry:
        all_creators: tuple[object, ...] = ()

    with pytest.raises(TargetError, match=r"no .*nowhere\.so; install vtexport from source"):
        load(Registry(), tmp_path / "nowhere.so")
