"""Full TensorRT, which no test machine has: its code on TensorRT for RTX, whose API is the same, and against its own bindings."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import pytest

from tests.checkpoints import MICRO
from vtexport.builder.build import build
from vtexport.builder.options import BuildOptions
from vtexport.errors import InputError, TargetError
from vtexport.graph.export import trace_language
from vtexport.models import read_spec
from vtexport.pruning import Geometry, make_plan
from vtexport.targets import get_target
from vtexport.targets.base import Compiled
from vtexport.targets.tensorrt import builder, full, target
from vtexport.targets.tensorrt.bindings import bindings
from vtexport.targets.tensorrt.engine import TensorRTEngine
from vtexport.targets.tensorrt.full import TensorRTTarget

rtx: ModuleType = pytest.importorskip("tensorrt_rtx_bindings", reason="the extra tensorrt-rtx is not installed")

PACKAGE = Path(target.__file__).parent


@pytest.mark.usefixtures("stand_in")
def test_plans_are_built_and_what_they_are_for_is_written_down(tmp_path: Path) -> None:
    made = BuildOptions(
        str(MICRO),
        0.25,
        "fastervlm",
        "tensorrt",
        "fp16",
        target_options={"plugins": 0, "max_batch": 2},
        self_check=False,
    )
    bundle = build(made, tmp_path / "bundle")
    entry = bundle.manifest.target
    assert entry.versions == {"tensorrt": "11.4.0.106"}
    assert entry.facts == {"gpu": "NVIDIA Test", "sm": 89}
    assert (entry.options["plugins"], entry.options["max_batch"], entry.options["strip_weights"]) == (False, 2, False)
    assert all((bundle.folder / path).stat().st_size > 100_000 for path in entry.graphs.values())
    assert not list(bundle.folder.rglob("*.onnx"))


def test_pruning_ops_are_left_to_plugins_and_all_else_is_inlined() -> None:
    spec = read_spec(MICRO)
    plan = make_plan("sparsevlm", Geometry.of(spec), keep=0.25, options={"layers": "1,4"})
    model = trace_language(spec, [plan], "fp16", room=9).model
    TensorRTTarget().prepare(model)
    nodes = [node for node in model.graph.all_nodes() if node.domain]
    assert {node.domain for node in nodes} == {"vtexport"}
    assert sorted(node.op_type for node in nodes) == sorted(["TokenScore", "TokenSelect", "TokenRecycle"] * 2)
    # A body would be taken before the plugin by some versions' parsers.
    assert not model.functions
    for node in nodes:
        assert node.attributes["plugin_version"].as_string() == "2"
        assert node.attributes["plugin_namespace"].as_string() == ""


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"hardware_compatible": "all", "plugins": 0},
            "is unknown to target tensorrt; choose one of none, same-sm, ampere\\+",
        ),
        ({"timing_cache": "nowhere/cache", "plugins": 0}, "its folder is missing"),
        ({"max_batch": 0, "plugins": 0}, "--max-batch 0 is out of range; give a whole number at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(given: dict[str, str | int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_target("tensorrt", given).check()


def test_missing_plugins_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtexport.native.plugins.library", lambda: None)
    with pytest.raises(InputError, match=r"libvtexport_plugins\.so is not installed.*--no-plugins"):
        TensorRTTarget().check()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("name", "version", "works"),
    [
        ("tensorrt", "10.14.1", False),
        ("tensorrt", "10.15.0", True),
        ("tensorrt", "9.3.0", False),
        ("tensorrt-llm", "10.12.0", False),
        ("tensorrt-llm", "10.13.2", True),
    ],
)
def test_an_old_tensorrt_is_refused(name: str, version: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "__version__", version)
    options = {"plugins": 0, **({"vision_runtime": "tensorrt"} if name == "tensorrt-llm" else {})}
    available = get_target(name, options).can_build()
    assert available.works == works
    least = {"tensorrt": "10.15", "tensorrt-llm": "10.13"}[name]
    assert works or available.reason == f"TensorRT {version} is too old; install {least} or later"


def test_without_tensorrt_or_a_gpu_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "this_gpu", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "install it with" in TensorRTTarget().can_build().reason
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    assert "builds on the GPU that will run the engines" in TensorRTTarget().can_build().reason


@pytest.mark.usefixtures("stand_in")
def test_a_bundle_opens_only_where_it_was_built_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = Compiled({"vision": "v", "language": "l"}, {"tensorrt": "11.4.0.106"}, {"gpu": "NVIDIA Test", "sm": 89})

    def open_on(capability: int, version: str = "11.4.0.106", **options: str | int) -> object:
        monkeypatch.setattr(target, "this_gpu", lambda: target.Device("NVIDIA Test", capability))
        monkeypatch.setattr(rtx, "__version__", version)
        return get_target("tensorrt", {"plugins": 0, **options}).open(tmp_path, compiled, [], 0)

    assert isinstance(open_on(89), TensorRTEngine)
    with pytest.raises(TargetError, match="built for compute capability 89, not for NVIDIA Test"):
        open_on(90)
    assert isinstance(open_on(90, hardware_compatible="ampere+"), TensorRTEngine)
    with pytest.raises(TargetError, match=r"built with tensorrt 11\.4\.0\.106, but this machine has 11\.5\.0"):
        open_on(89, "11.5.0")
    assert isinstance(open_on(89, "11.5.0", version_compatible=1), TensorRTEngine)
    with pytest.raises(TargetError, match=r"this machine has 10\.13\.0"):
        open_on(89, "10.13.0", version_compatible=1)


class Timings:
    """The timing cache of a builder's config: TensorRT for RTX, which measures nothing, ignores them."""

    def __init__(self, fits: bool) -> None:
        self.fits, self.known = fits, b""

    def create_timing_cache(self, known: bytes) -> Timings:
        self.known = known
        return self

    def set_timing_cache(self, cache: Timings, ignore_mismatch: bool) -> bool:
        return self.fits and cache is self and not ignore_mismatch

    def get_timing_cache(self) -> Timings:
        return self

    def serialize(self) -> bytes:
        return self.known + b" and more"


def test_the_timing_cache_is_read_and_written_back(tmp_path: Path) -> None:
    path, config = tmp_path / "cache", Timings(fits=True)
    builder.read_timings(config, path)
    builder.write_timings(config, path)
    builder.read_timings(config, path)
    assert config.known == b" and more"
    assert [one.name for one in tmp_path.iterdir()] == ["cache"]
    with pytest.raises(InputError, match="is not a timing cache of this GPU and TensorRT"):
        builder.read_timings(Timings(fits=False), path)
    with pytest.raises(InputError, match="cannot be read"):
        builder.read_timings(config, tmp_path)


# What variables of the sources stand for.
_CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": ("OnnxParser", "OnnxParserRefitter"),
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "refitter": "Refitter",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "runtime_config": "IRuntimeConfig",
}


def names_used() -> set[str]:
    """Every name of TensorRT's that the sources use: `BuilderFlag.TF32`, `Runtime.deserialize_cuda_engine`."""
    found = set()
    for source in ("bindings.py", "builder.py", "engine.py", "plan.py"):
        for node in ast.walk(ast.parse((PACKAGE / source).read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            path = ast.unparse(node).split(".")
            if path[0] == "trt":
                found.add(".".join(path[1:]))
            owner = path[-2].removeprefix("_")
            if owner in _CLASSES and path[0] in ("self", "graph", owner) and path[-1].isidentifier():
                classes = _CLASSES[owner]
                found.add("|".join(f"{one}.{path[-1]}" for one in ([classes] if isinstance(classes, str) else classes)))
    return found


CHECK = """
import importlib.util, os, sys
sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("tensorrt_bindings.tensorrt", sys.argv[1])
trt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trt)
def there(path):
    owner = trt
    for name in path.split("."):
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True
print([name for name in sys.argv[2:] if not any(map(there, name.split("|")))])
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_every_name_used_is_tensorrts_own(tmp_path: Path) -> None:
    """TensorRT 11.4's Python bindings, over libraries that are empty but for what loading them asks for."""
    try:
        files = distribution("tensorrt-cu13-bindings").files or []
    except PackageNotFoundError:
        pytest.skip("needs TensorRT's bindings: pip install --no-deps tensorrt-cu13-bindings")
    library = next(Path(str(file.locate())) for file in files if file.name == "tensorrt.so")
    needed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    wanted = {line.split()[-1] for line in needed.splitlines()}
    entries = [name for name in wanted if name.startswith(("create", "get", "init")) and name[0] != "_"]
    stub = "".join(f"void* {name}(void) {{ return 0; }}\n" for name in entries)
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        text = stub if name == "nvinfer" else ""
        out = tmp_path / f"lib{name}.so.11"
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{out.name}", "-o", out]
        subprocess.run(command, input=text, text=True, check=True)
    used = names_used()
    assert {"BuilderFlag.TF32", "Runtime.deserialize_cuda_engine", "IExecutionContext.execute_async_v3"} <= used
    # Only TensorRT for RTX builds ahead of time, compiles kernels for the GPU at hand, and captures graphs by itself.
    only_rtx = {
        "CudaGraphStrategy",
        "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
        "IRuntimeConfig.cuda_graph_strategy",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.set_runtime_cache",
        "ComputeCapability",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHECK, library, *sorted(used - only_rtx)],
        env={"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert not [name for name in used if not any(_there(rtx, one) for one in name.split("|"))]


def _there(owner: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def test_bindings_say_what_was_logged_first() -> None:
    """By the logger that TensorRT itself is given."""
    found = bindings("tensorrt_rtx_bindings")
    severity = rtx.ILogger
    warned: list[str] = []
    found.logger.begin(warned.append)
    assert found.first_error == "no reason given"
    for level, text in ((severity.WARNING, "slow"), (severity.ERROR, "one\n  thing"), (severity.INTERNAL_ERROR, "two")):
        found.logger.log(level, text)
    assert found.first_error == "one thing"
    assert warned == ["TensorRT: slow"]
    found.logger.begin()
    assert found.first_error == "no reason given"
