"""Function bodies and ONNX Runtime's kernels compute what the eager ops compute."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from vtexport.graph import nn_ops
from vtexport.graph.domains import DOMAIN_VERSION, NN, OPSET
from vtexport.graph.functions import FUNCTIONS, attach_functions
from vtexport.targets.onnxruntime.lowering import LowerToContrib
from vtexport.targets.tensorrt.attention import lower_attention


def node_model(op_type: str, feeds: dict[str, torch.Tensor], outputs: list[torch.Tensor], attributes) -> ir.Model:
    """A model of one `vtexport.nn` node, its function attached."""

    def value(name: str, tensor: torch.Tensor) -> ir.Value:
        kind = ir.DataType.from_numpy(tensor.numpy().dtype)
        return ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(kind))

    inputs = [value(name, tensor) for name, tensor in feeds.items()]
    made = [value(f"out{number}", tensor) for number, tensor in enumerate(outputs)]
    node = ir.Node(
        NN, op_type, inputs, ir.convenience.convert_attributes(attributes), outputs=made, version=DOMAIN_VERSION
    )
    model = ir.Model(ir.Graph(inputs, made, nodes=[node], opset_imports={"": OPSET}, name="one"), ir_version=10)
    attach_functions(model)
    return model


def run(model: ir.Model, feeds: dict[str, torch.Tensor]) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})


def check(op_type: str, feeds, attributes, expected, dtype: torch.dtype) -> None:
    outputs = list(expected) if isinstance(expected, tuple) else [expected]
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 4e-3, "rtol": 4e-3}
    model = node_model(op_type, feeds, outputs, attributes)
    for name, form in forms(model).items():
        for got, wanted in zip(run(form, feeds), outputs, strict=True):
            np.testing.assert_allclose(got, wanted.numpy(), err_msg=name, **tolerance)


def forms(model: ir.Model, kernel: bool = True) -> dict[str, ir.Model]:
    """A model with the function body, with ONNX Runtime's kernel, and with the body for TensorRT if that is another."""
    proto = ir.to_proto(model)
    lowered, tensorrt = (ir.from_proto(copy.deepcopy(proto)) for _ in range(2))
    lower_attention(tensorrt)
    changed = ir.to_proto(tensorrt) != proto
    found = {"body": model} | ({"kernel": _lower(lowered)} if kernel else {})
    return found | ({"tensorrt": tensorrt} if changed else {})


def _lower(model: ir.Model) -> ir.Model:
    LowerToContrib()(model)
    # ONNX Runtime fuses this one from its body.
    assert {name for domain, name, _ in model.functions if domain == NN} <= {"RMSNorm"}
    assert all(node.domain != NN or node.op_type == "RMSNorm" for node in model.graph)
    return model


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


both = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@both
def test_rms_norm(dtype: torch.dtype) -> None:
    feeds = {"x": random(2, 5, 24, dtype=dtype), "weight": random(24, dtype=dtype)}
    check("RMSNorm", feeds, {"epsilon": 1e-5}, nn_ops.rms_norm(*feeds.values(), 1e-5), dtype)


@both
def test_rotary(dtype: torch.dtype) -> None:
    angles = torch.arange(32)[:, None] * torch.rand(4, generator=torch.Generator().manual_seed(0))
    feeds = {
        "x": random(2, 5, 24, dtype=dtype),
        "positions": torch.tensor([[0, 1, 2, 3, 4], [9, 3, 17, 31, 0]]),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
    }
    check("Rotary", feeds, {"num_heads": 3}, nn_ops.rotary(*feeds.values(), 3), dtype)


@both
def test_full_attention(dtype: torch.dtype) -> None:
    feeds = {name: random(2, 7, 24 + 0 * i, dtype=dtype) + i for i, name in enumerate(("q", "k", "v"))}
    expected = nn_ops.full_attention(*feeds.values(), 3, 0.3)
    check("FullAttention", feeds, {"num_heads": 3, "scale": 0.3}, expected, dtype)


@both
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_causal_attention(heads: int, groups: int, dtype: torch.dtype) -> None:
    feeds = {
        "q": random(2, 9, heads * 8, dtype=dtype),
        "k": random(2, 9, groups * 8, dtype=dtype),
        "v": random(2, 9, groups * 8, dtype=dtype) + 1,
    }
    attributes = {"num_heads": heads, "kv_heads": groups, "scale": 0.3}
    check("CausalAttention", feeds, attributes, nn_ops.causal_attention(*feeds.values(), heads, groups, 0.3), dtype)


@both
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("new", [1, 4])
def test_cached_attention_with_rows_of_different_length(heads: int, groups: int, new: int, dtype: torch.dtype) -> None:
    length = torch.tensor([3, 7, 0])
    caches = [random(3, groups, 7 + new, 8, dtype=dtype) + i for i in range(2)]
    for cache in caches:
        # What lies behind a row's length is never read: make it loud.
        for row, filled in enumerate(length.tolist()):
            cache[row, :, filled:] = 0
    feeds = {
        "q": random(3, new, heads * 8, dtype=dtype),
        "k": random(3, new, groups * 8, dtype=dtype),
        "v": random(3, new, groups * 8, dtype=dtype) + 1,
        "past_key": caches[0],
        "past_value": caches[1],
        "length": length,
    }
    attributes = {"num_heads": heads, "kv_heads": groups, "scale": 0.3}
    expected = nn_ops.cached_attention(*feeds.values(), heads, groups, 0.3)
    model = node_model("CachedAttention", feeds, list(expected), attributes)
    # ONNX Runtime's kernel takes one token behind a cache; several stay with the body.
    different = forms(model, kernel=new == 1)
    assert "tensorrt" in different
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for found in (run(form, feeds) for form in different.values()):
        np.testing.assert_allclose(found[0], expected[0].numpy(), atol=tolerance, rtol=tolerance)
        for got, wanted in zip(found[1:], expected[1:], strict=True):
            for row, filled in enumerate(length.tolist()):
                np.testing.assert_array_equal(got[row, :, : filled + new], wanted.numpy()[row, :, : filled + new])


def test_function_names_are_no_standard_ops() -> None:
    # TensorRT's parser goes by the name alone and would take a function for the op.
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert not standard & {function.name for function in FUNCTIONS}


def test_graphs_of_a_bundle_are_valid_onnx(micro_bundle: Path, tmp_path: Path) -> None:
    # The checker takes no file that has another name elsewhere, as what is deployed of a bundle gives it.
    copy = shutil.copytree(micro_bundle, tmp_path / "copy")
    # Fused kernels are ONNX Runtime's; everything else must be the standard's.
    for name in ("engine/vision.onnx", "engine/language.onnx"):
        model = onnx.load(copy / name, load_external_data=False)
        assert {opset.domain for opset in model.opset_import} <= {"", "vtexport", "vtexport.nn", "com.microsoft"}
        assert all(init.data_location == onnx.TensorProto.EXTERNAL for init in model.graph.initializer)
        onnx.checker.check_model(str(copy / name))


def test_onnxruntime_fuses_every_norm(micro_bundle: Path, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "language.onnx"), 3
    ort.InferenceSession(micro_bundle / "engine/language.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "language.onnx", load_external_data=False).graph.node
    # Two norms a layer, and the last.
    assert sum(node.op_type == "SimplifiedLayerNormalization" for node in nodes) == 2 * 12 + 1


def test_tracing_is_reproducible(tiny_checkpoint: Path) -> None:
    from vtexport.graph.export import trace_vision
    from vtexport.models import read_spec
    from vtexport.pruning import Geometry, make_plan

    spec = read_spec(tiny_checkpoint)
    plan = make_plan("fastervlm", Geometry(25, 3), keep=0.4)
    graphs = [trace_vision(spec, [plan], "fp32", False).model.graph for _ in range(2)]
    texts = [[(n.op_type, [v and v.name for v in n.inputs], n.outputs[0].name) for n in g] for g in graphs]
    assert texts[0] == texts[1]
