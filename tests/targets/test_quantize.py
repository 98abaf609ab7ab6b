"""Weight-only quantisation: ONNX Runtime's kernel multiplies by what we say it does, engines answer as rounded models do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.checkpoints import MICRO, family_checkpoint, random_checkpoint
from tests.conftest import BuildBundle, check_refused
from vtexport.builder.build import build_dense_twin
from vtexport.bundle.folder import Bundle
from vtexport.micro import heldout
from vtexport.models import read_spec
from vtexport.models.spec import ViewChoice
from vtexport.runtime.runner import Runner
from vtexport.targets import get_target
from vtexport.targets.onnxruntime import speed
from vtexport.targets.onnxruntime.quantize import BLOCK, SCHEMES, NBits
from vtexport.targets.quantize import Scheme
from vtexport.targets.tensorrt import quantize as tensorrt


@given(rows=st.integers(1, 9), columns=st.integers(1, 100), bits=st.sampled_from([8, 4]), seed=st.integers(0, 99))
def test_the_kernel_multiplies_by_the_rounded_weight(rows: int, columns: int, bits: int, seed: int) -> None:
    weight, scheme = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32), NBits(bits)
    check_product(scheme, weight)
    # No value is farther off than half a step of its block.
    _, scales, _ = scheme.encode(weight)
    step = np.repeat(np.abs(scales), BLOCK, axis=1)[:, :columns]
    assert (np.abs(scheme.rounded(weight) - weight) <= 0.51 * step + 1e-6).all()


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 3).map(lambda blocks: blocks * tensorrt.BLOCK),
    kind=st.sampled_from(sorted(tensorrt.SCHEMES)),
    seed=st.integers(0, 99),
)
def test_what_tensorrt_dequantises_is_the_rounded_weight(rows: int, columns: int, kind: str, seed: int) -> None:
    weight, scheme = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32), tensorrt.SCHEMES[kind]
    check_product(scheme, weight)
    # A block's scale puts its largest number at -8; one as large of the other sign is a whole step from 7.
    largest = np.abs(weight).max()
    allowed = {"int8": 0.51 / 127, "fp8": 1 / 16, "int4": 1.01 / 8}[kind] * largest
    assert np.abs(scheme.rounded(weight) - weight).max() <= allowed


def test_an_output_of_zeros_stays_zero() -> None:
    for scheme in (*SCHEMES.values(), *tensorrt.SCHEMES.values()):
        assert (scheme.rounded(np.zeros((2, 128), np.float16)) == 0).all()


def check_product(scheme: Scheme, weight: np.ndarray) -> None:
    """Run a graph of one product on ONNX Runtime, its weight quantised as a build would."""
    x = np.random.default_rng(1).normal(size=(3, weight.shape[1])).astype(np.float32)
    given_x = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
    parts = []
    kinds = scheme.tensors(*weight.shape, ir.DataType.FLOAT)
    for name, array, (kind, shape) in zip(scheme.parts, scheme.encode(weight), kinds, strict=True):
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
        packed = ir.PackedTensor(array, kind, shape=ir.Shape(shape), name=name) if kind == ir.DataType.INT4 else None
        value.const_value = packed or ir.Tensor(array, dtype=kind, name=name)
        parts.append(value)
    nodes = scheme.product(given_x, parts, *weight.shape)
    out = nodes[-1].outputs[0]
    out.name, out.type = "y", given_x.type
    graph = ir.Graph([given_x], [out], nodes=nodes, initializers=parts, opset_imports={"": 18, **scheme.opset()})
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    (got,) = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})
    taken = rounded_to_8_bits(x) if scheme.rounds_activations else x
    np.testing.assert_allclose(got, taken @ scheme.rounded(weight).T, rtol=1e-4, atol=1e-4)


def rounded_to_8_bits(x: np.ndarray) -> np.ndarray:
    """What ONNX Runtime multiplies instead of activations [B, K]: 127 steps of either sign in each block of channels."""
    columns = x.shape[-1]
    blocks = np.pad(x, [(0, 0), (0, -columns % BLOCK)]).reshape(len(x), -1, BLOCK)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    return (np.rint(blocks / np.where(scale == 0, 1, scale)) * scale).reshape(len(x), -1)[:, :columns]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_head_of_tied_weights_is_rounded_and_the_embeddings_are_not(
    target: str, build_bundle: BuildBundle, tmp_path: Path
) -> None:
    """The self-check of the build compares with transformers on such weights."""
    if not get_target(target).can_run().works:
        pytest.skip(f"{target} does not run here")
    model = family_checkpoint(tmp_path / "model", "llava_onevision")
    choice = ViewChoice(grid="2x2")
    assert read_spec(model, choice).decoder.tied_embeddings
    options: dict[str, Any] = {"target": target, "target_options": {"quantize": "int8"}}
    bundle = Bundle.open(build_bundle(model, None, "dense", views=choice, **options))
    names = set(ir.load(bundle.folder / "engine/language.onnx").graph.initializers)
    assert "decoder.embed_tokens.weight" in names
    assert any(name.startswith("decoder.embed_tokens.weight.") for name in names)


@pytest.mark.parametrize("bits", sorted(SCHEMES))
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_engine_is_the_rounded_model_and_smaller(bits: str, dtype: str, build_bundle: BuildBundle) -> None:
    plain = Bundle.open(build_bundle(MICRO, 0.25, "fastervlm", dtype=dtype, self_check=False))
    bundle = Bundle.open(build_bundle(MICRO, 0.25, "fastervlm", dtype=dtype, target_options={"quantize": bits}))
    found = bundle.manifest.verification
    assert found.same_kept
    assert found.max_logit_error < found.tolerance
    assert found.rounded_logit_error is not None
    assert found.max_logit_error < found.rounded_logit_error < 0.3
    assert bundle.manifest.target.options["quantize"] == bits
    assert bundle.size() < plain.size() * {"fp32": 0.65, "fp16": 0.8}[dtype]
    layers = bundle.spec().decoder.num_layers
    model = ir.load(bundle.folder / "engine/language.onnx")
    held = [node.attributes.get_int("bits") for node in model.graph if node.op_type == "MatMulNBits"]
    # Seven per layer, and the head, which has 8 bits anyway.
    assert held == 7 * layers * [int(bits.removeprefix("int"))] + [8]
    # No weight of a layer is left as it was.
    left = [weight for weight in model.graph.initializers if weight.startswith("decoder.layers")]
    assert all(w.endswith((".packed", ".scales", ".zero_points", "norm.weight")) for w in left)


def test_pruning_and_quantisation_combine(build_bundle: BuildBundle) -> None:
    """Kept tokens of a vision stage are the plain build's: its tower is not rounded. Answers stay near the plain ones."""
    examples = list(heldout.examples(64))
    pairs = [(Image.fromarray(example.image), example.question.text) for example in examples]
    plain = Runner.open(build_bundle(MICRO, 0.25, "fastervlm", self_check=False)).ask(pairs, 6)
    small = Runner.open(
        build_bundle(MICRO, 0.25, "fastervlm", target_options={"quantize": "int8"}, self_check=False)
    ).ask(pairs, 6)
    assert [answer.stages for answer in small] == [answer.stages for answer in plain]
    assert sum(a.text == b.text for a, b in zip(plain, small, strict=True)) >= 60


@pytest.mark.parametrize("method", ["sparsevlm", "fastervlm+sparsevlm"])
def test_pruning_inside_a_quantised_decoder_is_checked_too(method: str, build_bundle: BuildBundle) -> None:
    bundle = Bundle.open(build_bundle(MICRO, 0.4, method, target_options={"quantize": "int4"}))
    assert bundle.manifest.verification.same_kept
    assert bundle.manifest.verification.same_tokens


def test_widths_that_no_block_divides(build_bundle: BuildBundle, tmp_path: Path) -> None:
    text = {
        "hidden_size": 36,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "intermediate_size": 50,
    }
    folder = random_checkpoint(tmp_path, 5, text=text)
    bundle = Bundle.open(build_bundle(folder, 0.4, "fastervlm", target_options={"quantize": "int4"}))
    assert bundle.manifest.verification.max_logit_error < 1e-4


def test_the_dense_twin_has_the_same_weights(build_bundle: BuildBundle, tmp_path: Path) -> None:
    bundle = Bundle.open(build_bundle(MICRO, 0.25, "fastervlm", target_options={"quantize": "int8"}))
    twin = build_dense_twin(bundle, tmp_path / "dense")
    assert twin.manifest.target.options["quantize"] == "int8"
    model = ir.load(twin.folder / "engine/language.onnx")
    assert any(node.op_type == "MatMulNBits" for node in model.graph)
    assert Runner.open(twin.folder).ask([(heldout_image(), "what digit is red?")], 4)[0].text


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_build_says_where_quantised_weights_are_slower(
    dtype: str, vtexport: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = speed.measure
    measured: list[speed.Timed] = []

    def slow(*of: Any) -> speed.Timed:
        found = measure(*of)
        measured.append(replace(found, quantised={stage: 3 * time for stage, time in found.plain.items()}))
        return measured[-1]

    monkeypatch.setattr(speed, "measure", slow)
    options = ("--method", "fastervlm", "--quantize", "int4", "--dtype", dtype)
    built = vtexport("build", "--model", MICRO, "--keep", "0.25", *options, "--out", tmp_path / "bundle")
    assert built.code == 0, built.err
    said = " ".join(built.err.split())
    assert "takes 3.0 times as long per token and 3.0 times as long for prompts as with" in said
    assert f"{dtype} weights" in said
    decoder = read_spec(MICRO).decoder
    assert [(one.rows, one.columns) for one in measured] == [(decoder.intermediate_size, decoder.hidden_size)]
    assert all(time > 0 for one in measured for time in one.plain.values())


def test_no_warning_where_they_are_not() -> None:
    found = speed.Timed(8, 8, {"per token": 1.0, "for prompts": 9.0}, {"per token": 0.3, "for prompts": 9.5})
    assert found.warning("int4", "fp32") is None
    said = replace(found, quantised={"per token": 0.3, "for prompts": 18.0}).warning("int4", "fp32")
    assert said is not None
    assert "takes 2.0 times as long for prompts as" in said


def heldout_image() -> Image.Image:
    return Image.fromarray(next(heldout.examples()).image)


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted(tensorrt.SCHEMES))
def test_what_tensorrt_for_rtx_builds_from_is_the_rounded_model(kind: str, build_bundle: BuildBundle) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="the extra tensorrt-rtx is not installed")
    made = {"sm": "89", "max_batch": 1, "quantize": kind}
    found = Bundle.open(build_bundle(MICRO, 0.25, "fastervlm", target="tensorrt-rtx", target_options=made))
    assert found.manifest.verification.same_kept
    assert found.manifest.verification.same_tokens
    assert found.manifest.verification.max_logit_error < 1e-4


def test_tensorrt_for_rtx_builds_it_smaller(build_bundle: BuildBundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="the extra tensorrt-rtx is not installed")
    # Widths that weigh more than a plan's code does.
    text = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}
    folder = random_checkpoint(tmp_path, 5, text=text)
    sizes = {}
    for kind in ("", *tensorrt.SCHEMES):
        made = {"sm": "89", "max_batch": 1, "quantize": kind}
        bundle = build_bundle(
            folder, 0.4, "fastervlm", target="tensorrt-rtx", dtype="fp16", target_options=made, self_check=False
        )
        sizes[kind] = (bundle / "engine/language.plan").stat().st_size
    assert max(sizes["int8"], sizes["fp8"]) < 0.75 * sizes[""]
    assert sizes["int4"] < 0.6 * sizes[""]


def test_a_build_says_no_more_than_without(vtexport) -> None:
    command = ("build", "--model", "micro-llava", "--method", "dense", "--out", "b", "--quantize", "int4")
    outcome = vtexport(*command)
    assert outcome.code == 0
    assert "INFO" not in outcome.err + outcome.out


def test_what_cannot_be_is_refused(vtexport, tmp_path: Path) -> None:
    command = ("build", "--model", "micro-llava", "--keep", "0.4", "--method", "fastervlm", "--out", "b")
    check_refused(
        vtexport(*command, "--quantize", "int3"),
        "--quantize int3 is unknown to target onnxruntime; choose one of int8, int4",
        tmp_path,
    )
    outcome = vtexport(*command, "--quantize", "nf4", "--target", "tensorrt-rtx")
    check_refused(outcome, "--quantize nf4 is unknown to target tensorrt-rtx; choose one of int8, fp8, int4", tmp_path)
