"""TensorRT for RTX: real plans, built without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from tests.checkpoints import MICRO, random_checkpoint, random_clip
from tests.conftest import check_refused
from vtexport.builder.build import build
from vtexport.builder.options import BuildOptions
from vtexport.bundle.folder import Bundle
from vtexport.errors import InputError, TargetError
from vtexport.pruning import METHODS, Geometry, make_plan
from vtexport.runtime.runner import Runner
from vtexport.targets import get_target
from vtexport.targets.tensorrt.bindings import bindings
from vtexport.targets.tensorrt.builder import Build, Settings, build_plan
from vtexport.targets.tensorrt.child import compile_apart
from vtexport.targets.tensorrt.rtx import TensorRTRTXTarget, parse_architectures

pytest.importorskip("tensorrt_rtx_bindings", reason="the extra tensorrt-rtx is not installed")


class Recorder:
    """A build's progress, kept."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.steps: dict[str, int] = {}
        self.warnings: list[str] = []

    def stage(self, text: str, total: int | None = None) -> None:
        self.stages.append((text, total))

    def advance(self, steps: int = 1) -> None:
        name = self.stages[-1][0]
        self.steps[name] = self.steps.get(name, 0) + steps

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Recorder]:
    out, recorder = tmp_path_factory.mktemp("rtx") / "bundle", Recorder()
    options = BuildOptions(str(MICRO), 0.25, target="tensorrt-rtx", dtype="fp16", target_options={"sm": "89,120"})
    return build(options, out, progress=recorder), recorder


def test_vision_and_language_are_real_plans(built: tuple[Bundle, Recorder]) -> None:
    bundle, _ = built
    weights = MICRO.joinpath("model.safetensors").stat().st_size
    graphs = bundle.manifest.target.graphs
    assert set(graphs) == {"vision", "language"}
    sizes = {name: (bundle.folder / path).stat().st_size for name, path in graphs.items()}
    # A plan holds its weights, those of the language model being most of the checkpoint.
    assert sizes["language"] > 0.5 * weights
    assert not list(bundle.folder.rglob("*.onnx"))
    assert not list(bundle.folder.rglob("weights.safetensors"))


def test_the_onnx_files_were_verified_where_the_plans_cannot_run(built: tuple[Bundle, Recorder]) -> None:
    verification = built[0].manifest.verification
    assert verification is not None
    assert "ONNX files of tensorrt-rtx" in verification.ran
    assert verification.same_kept


def test_tensorrts_progress_is_shown(built: tuple[Bundle, Recorder]) -> None:
    recorder = built[1]
    for graph in ("vision", "language"):
        phase, total = next((text, total) for text, total in recorder.stages if text.startswith(f"compile {graph}:"))
        assert total is not None
        assert 0 < recorder.steps[phase] <= total


def test_running_without_a_gpu_is_a_clear_error(built: tuple[Bundle, Recorder]) -> None:
    if TensorRTRTXTarget().can_run().works:
        pytest.skip("this machine has a GPU")
    with pytest.raises(TargetError, match="cannot run here: no CUDA GPU"):
        Runner.open(built[0].folder)


#: those of which no part is in another one
SAMPLE = ("cdpruner", "sgl", "fastervlm+sparsevlm")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in SAMPLE else pytest.mark.long)
        for name in (*METHODS, "fastervlm+sparsevlm")
    ],
)
def test_every_method_builds(method: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    keep = 1.0 if method == "dense" else 0.7
    dtype = "fp16" if method in ("sparsevlm", "visionzip") else "fp32"
    own = {"clip": str(random_clip(tmp_path / "clip", 5, 48))} if method == "cdpruner" else {}
    options = BuildOptions(
        str(tiny_checkpoint), keep, method, target="tensorrt-rtx", dtype=dtype, method_options=own, self_check=False
    )
    bundle = build(options, tmp_path / "bundle")
    assert all((bundle.folder / path).stat().st_size > 10_000 for path in bundle.manifest.target.graphs.values())


def fused(plan: Path) -> tuple[int, int]:
    """How many attention layers a TensorRT plan for one GPU runs in a fused kernel: of prompts or images, of tokens."""
    data = plan.read_bytes()
    return data.count(b"function={ name=_gemm_mha_v2 "), data.count(b"function={ name=_gemv_mha_v1 ")


#: query heads, key heads and head size of a decoder
GEOMETRIES = {"llava-1.5-7b": (32, 32, 128), "mistral": (32, 8, 128), "qwen2-7b": (28, 4, 128), "two heads": (2, 2, 64)}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_attention_is_fused_at_the_heads_of_real_models(name: str, tmp_path: Path) -> None:
    """CLIP-L's heads and a decoder's, two layers each; all other sizes are small."""
    heads, groups, size = GEOMETRIES[name]
    tower = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 64, "num_hidden_layers": 3}
    text = {
        "hidden_size": 16 * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": size,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
    }
    model = random_checkpoint(tmp_path / "model", 3, vision=tower, text=text)
    asked = {"sm": "89", "max_batch": 2}
    options = BuildOptions(str(model), 0.8, "fastv", "tensorrt-rtx", "fp16", {"layers": "0"}, asked, self_check=False)
    graphs = build(options, tmp_path / "bundle").manifest.target.graphs
    assert {graph: fused(tmp_path / "bundle" / path) for graph, path in graphs.items()} == {
        "vision": (2, 0),
        # TensorRT has no kernel for single tokens of fewer than four heads, and takes that for prompts.
        "language": (2, 2) if heads >= 4 else (4, 0),
    }


@pytest.mark.long
def test_keep_auto_builds(tmp_path: Path) -> None:
    options = BuildOptions("micro-llava", "auto", target="tensorrt-rtx", buckets=(0.5, 0.25), target_accuracy=0.9)
    bundle = build(replace(options, self_check=False, target_options={"sm": "89"}), tmp_path / "bundle")
    assert set(bundle.manifest.target.graphs) == {"vision", "language"}
    assert not list(bundle.folder.rglob("*.onnx"))


def test_tensorrts_refusal_becomes_ours(tmp_path: Path) -> None:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("NoSuchOp", ["x"], ["y"])], "strange", [x], [y])
    source = tmp_path / "strange.onnx"
    onnx.save(onnx.helper.make_model(graph), source)
    settings = Settings(architectures=(89,))
    job = Build("vision", [{}], settings, lambda _text, _total: None, lambda _steps: None, lambda _text: None)
    with pytest.raises(TargetError, match="TensorRT cannot parse vision"):
        build_plan(bindings("tensorrt_rtx_bindings"), source, tmp_path / "strange.plan", job)


def a_matmul(folder: Path) -> tuple[Path, Build]:
    """An ONNX file of one MatMul, and what it takes to compile it."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT16
    x, w, y = (helper.make_tensor_value_info(name, kind, [8, 8]) for name in "xwy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [x, w], [y])
    source = folder / "product.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), source)
    profile = dict.fromkeys("xw", ((8, 8), (8, 8), (8, 8)))
    return source, Build("product", [profile], Settings(architectures=(89,)), unheard, unheard, unheard)


def unheard(*_: object) -> None:
    """Where nobody listens."""


def test_a_plan_is_compiled_in_a_process_of_its_own(tmp_path: Path) -> None:
    source, job = a_matmul(tmp_path)
    stages: list[str] = []
    heard = replace(job, report=lambda text, _total: stages.append(text))
    compile_apart("tensorrt_rtx_bindings", None, source, tmp_path / "product.plan", heard)
    assert (tmp_path / "product.plan").stat().st_size > 1000
    assert stages
    assert stages[0].startswith("compile product")
    with pytest.raises(OSError, match="No space left"):
        compile_apart("tensorrt_rtx_bindings", None, source, Path("/dev/full"), job)
    source.write_bytes(b"no graph")
    with pytest.raises(TargetError, match="TensorRT cannot parse product"):
        compile_apart("tensorrt_rtx_bindings", None, source, tmp_path / "none.plan", job)


@pytest.mark.parametrize(
    ("crash", "ending"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os._exit(3)", "exit code 3"),
        ("raise KeyError('lost')", "exit code 1: KeyError: 'lost'"),
    ],
)
def test_a_crash_of_tensorrt_is_one_line(
    vtexport, crash: str, ending: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the processes that compile, a module of TensorRT's name crashes when the builder is made."""
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'vtexport.targets.tensorrt.child' in sys.orig_argv:\n"
        "    import tensorrt_rtx_bindings as rtx\n"
        "    class Builder:\n"
        "        def __init__(self, logger):\n"
        f"            {crash}\n"
        "    rtx.Builder = Builder\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(shim))
    outcome = vtexport("build", "--model", tiny_checkpoint, "--keep", "0.7", "--target", "tensorrt-rtx", "--out", "out")
    assert outcome.code == 2
    assert outcome.out == ""
    error = outcome.err.splitlines()[-1]
    assert error == f"error: TensorRT crashed while it compiled vision ({ending}); please report this model"
    assert [path.name for path in tmp_path.iterdir()] == ["shim"]


def test_architectures() -> None:
    assert parse_architectures("120,86,86") == (86, 120)
    with pytest.raises(InputError, match="not a list of numbers"):
        parse_architectures("ada")
    with pytest.raises(InputError, match="--sm 75 is not supported"):
        parse_architectures("75")


def test_stripping_needs_a_gpu() -> None:
    if TensorRTRTXTarget().can_run().works:
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="needs a GPU in this machine"):
        TensorRTRTXTarget(strip_weights=True).check()


@pytest.mark.parametrize(("name", "least"), [("max_batch", 1), ("max_text", 64)])
def test_profiles_need_room(name: str, least: int) -> None:
    flag = name.replace("_", "-")
    with pytest.raises(InputError, match=f"--{flag} 0 is out of range; give a whole number at least {least}"):
        get_target("tensorrt-rtx", {name: 0})


@pytest.mark.gpu
@pytest.mark.skipif(not TensorRTRTXTarget().can_run().works, reason="needs an RTX GPU")
def test_plans_run_on_a_gpu(built: tuple[Bundle, Recorder], micro_runner: Runner, photo: Path) -> None:
    from PIL import Image

    pair = (Image.open(photo).convert("RGB"), "how many digits are there?")
    assert Runner.open(built[0].folder).ask([pair])[0].text == micro_runner.ask([pair])[0].text


@pytest.mark.long
def test_engines_in_bf16_build(tmp_path: Path) -> None:
    made = BuildOptions(
        str(MICRO), 0.25, "fastervlm", "tensorrt-rtx", "bf16", target_options={"sm": "89", "max_batch": 1}
    )
    bundle = build(made, tmp_path / "bundle")
    ports = {port.name: port.dtype for port in bundle.manifest.graphs["vision"].outputs}
    assert ports == {"visual": "float", "kept": "int32"}
    caches = {port.dtype for port in bundle.manifest.graphs["language"].inputs if port.name.startswith("past.")}
    assert caches == {"bfloat16"}
    # No runtime here has kernels for it: what was checked is a small model in fp32, and the files by structure.
    assert "a random model of the same layers" in bundle.manifest.verification.ran
    assert bundle.manifest.verification.same_tokens


def test_bf16_weights_stay_as_a_checkpoint_has_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from vtexport.graph.export import trace_language
    from vtexport.graph.weights import WEIGHTS_FILE, Weights
    from vtexport.models import Checkpoint, read_spec
    from vtexport.models.rope import rope_tables

    folder = random_checkpoint(tmp_path / "model", 1)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    spec = read_spec(folder)
    cos, sin = rope_tables(spec)
    model = trace_language(spec, [make_plan("dense", Geometry.of(spec))], "bf16", room=None).model
    weights = Weights([model], Checkpoint.open(folder), {"rope.cos": cos.numpy(), "rope.sin": sin.numpy()})
    place = tmp_path / "engine"
    place.mkdir()
    weights.write(place, lambda _bytes: None)
    # Only RoPE's tables are new.
    assert weights.bytes_written == 2 * 2 * cos.numel()
    tables = load_file(place / WEIGHTS_FILE)
    assert torch.equal(tables["rope.cos"], cos.bfloat16())
    value = model.graph.initializers["decoder.layers.0.mlp.up_proj.weight"].const_value
    own = next(tensor for name, tensor in tensors.items() if name.endswith("layers.0.mlp.up_proj.weight"))
    data = (place / "model.safetensors").read_bytes()[value.offset : value.offset + value.length]
    assert data == own.contiguous().view(torch.uint8).numpy().tobytes()


def test_where_bf16_cannot_be_is_refused(vtexport, tmp_path: Path) -> None:
    command = (
        "build",
        "--model",
        "micro-llava",
        "--keep",
        "0.4",
        "--method",
        "fastervlm",
        "--dtype",
        "bf16",
        "--out",
        "b",
    )
    check_refused(vtexport(*command), "target onnxruntime has no dtype 'bf16'", tmp_path)
    quantised = (*command, "--target", "tensorrt-rtx", "--quantize", "int8")
    check_refused(
        vtexport(*quantised), "--quantize rounds weights in fp16 or fp32 for target tensorrt-rtx, not bf16", tmp_path
    )
