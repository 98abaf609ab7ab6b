"""Weight-only quantisation: ONNX Runtime's kernel multiplies by what we say it does, engines answer as rounded models do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.checkpoints import MICRO, random_checkpoint
from tests.conftest import BuildBundle, check_refused
from vtexport.build import build_dense_twin
from vtexport.bundle import Bundle
from vtexport.micro import heldout
from vtexport.runtime import Runner
from vtexport.targets.onnxruntime.quantize import BITS, BLOCK, encode, rounded


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 100),
    bits=st.sampled_from(sorted(BITS.values())),
    seed=st.integers(0, 99),
)
def test_the_kernel_multiplies_by_the_rounded_weight(rows: int, columns: int, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(rows, columns)).astype(np.float32)
    x = rng.normal(size=(3, columns)).astype(np.float32)
    encoded = encode(weight, bits)
    session = onnxruntime.InferenceSession(one_product(encoded, rows, columns, bits).SerializeToString())
    (got,) = session.run(None, {"x": x})
    np.testing.assert_allclose(got, x @ rounded(weight, bits).T, rtol=1e-4, atol=1e-4)
    # No value is farther off than half a step of its block.
    step = np.repeat(np.abs(encoded.scales), BLOCK, axis=1)[:, :columns]
    assert (np.abs(rounded(weight, bits) - weight) <= 0.51 * step + 1e-6).all()


def one_product(encoded, rows: int, columns: int, bits: int) -> onnx.ModelProto:
    parts = [onnx.numpy_helper.from_array(getattr(encoded, name), name) for name in vars(encoded)]
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK}
    node = onnx.helper.make_node("MatMulNBits", ["x", *vars(encoded)], ["y"], domain="com.microsoft", **sizes)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3, None]) for name in "xy")
    graph = onnx.helper.make_graph([node], "one", [x], [y], parts)
    domains = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)


@pytest.mark.parametrize("bits", sorted(BITS))
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_engine_is_the_rounded_model_and_smaller(bits: str, dtype: str, build_bundle: BuildBundle) -> None:
    plain = Bundle.open(build_bundle(MICRO, 0.25, "fastervlm", dtype=dtype, verify=False))
    bundle = Bundle.open(build_bundle(MICRO, 0.25, "fastervlm", dtype=dtype, target_options={"quantize": bits}))
    found = bundle.manifest.verification
    assert found.same_kept
    assert found.max_logit_error < found.tolerance
    assert bundle.manifest.target.options["quantize"] == bits
    assert bundle.size() < plain.size() * {"fp32": 0.65, "fp16": 0.8}[dtype]
    layers = bundle.spec().decoder.num_layers
    for name in ("prefill", "decode"):
        model = ir.load(bundle.folder / "engine" / f"{name}.onnx")
        assert sum(node.op_type == "MatMulNBits" for node in model.graph) == 7 * layers
        # No weight of a layer is left as it was.
        left = [weight for weight in model.graph.initializers if weight.startswith("decoder.layers")]
        assert all(w.endswith((".packed", ".scales", ".zero_points", "norm.weight")) for w in left)


def test_pruning_and_quantisation_combine(build_bundle: BuildBundle) -> None:
    """Kept tokens of a vision stage are the plain build's: its tower is not rounded. Answers stay near the plain ones."""
    examples = list(heldout.examples(64))
    pairs = [(Image.fromarray(example.image), example.question.text) for example in examples]
    plain = Runner.open(build_bundle(MICRO, 0.25, "fastervlm", verify=False)).ask(pairs, 6)
    small = Runner.open(build_bundle(MICRO, 0.25, "fastervlm", target_options={"quantize": "int8"}, verify=False)).ask(
        pairs, 6
    )
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
    model = ir.load(twin.folder / "engine/prefill.onnx")
    assert any(node.op_type == "MatMulNBits" for node in model.graph)
    assert Runner.open(twin.folder).ask([(heldout_image(), "what digit is red?")], 4)[0].text


def heldout_image() -> Image.Image:
    return Image.fromarray(next(heldout.examples()).image)


def test_what_cannot_be_is_refused(vtexport, tmp_path: Path) -> None:
    command = ("build", "--model", "micro-llava", "--keep", "0.4", "--method", "fastervlm", "--out", "b")
    check_refused(
        vtexport(*command, "--quantize", "int3"), "--quantize int3 is unknown; choose one of int8, int4", tmp_path
    )
    outcome = vtexport(*command, "--quantize", "int8", "--target", "tensorrt-rtx")
    check_refused(outcome, "--quantize has no effect with target tensorrt-rtx", tmp_path)
