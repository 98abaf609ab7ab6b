"""TokenScore and TokenSelect: the PyTorch op, a plain loop, and the ONNX function body say the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vtexport.graph.functions import OPSET, attach_functions
from vtexport.pruning import ops
from vtexport.pruning.onnx_node import DOMAIN_VERSION, PRUNING


def run_function(op_type: str, feeds: dict[str, np.ndarray], outputs: int, **attributes: int | float) -> list:
    """Run one node `vtexport::op_type`, through its function body, on ONNX Runtime."""
    inputs = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        for name, array in feeds.items()
    ]
    node = ir.node(op_type, inputs, attributes, domain=PRUNING, num_outputs=outputs, version=DOMAIN_VERSION)
    for number, value in enumerate(node.outputs):
        value.name = f"out{number}"
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": OPSET}, name="one")
    model = ir.Model(graph, ir_version=10)
    attach_functions(model)
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def select_by_loop(score: np.ndarray, keep: int) -> list[list[int]]:
    chosen = []
    for row in score:
        ranked = [-np.inf if np.isnan(value) else value for value in row]
        order = sorted(range(len(row)), key=lambda i: (-ranked[i], i))
        chosen.append(sorted(order[:keep]))
    return chosen


# Few distinct values, so that ties are the rule; and the values that are not numbers.
scores = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, np.nan, np.inf, -np.inf])


@settings(deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), tokens=st.integers(1, 40))
def test_select_breaks_ties_by_index_everywhere(data: st.DataObject, batch: int, tokens: int) -> None:
    score = data.draw(arrays(np.float32, (batch, tokens), elements=scores.map(np.float32)))
    keep = data.draw(st.integers(1, tokens))
    hidden = np.random.default_rng(0).standard_normal((batch, tokens, 3)).astype(np.float32)
    expected = select_by_loop(score, keep)
    kept, index = ops.token_select(torch.from_numpy(hidden), torch.from_numpy(score), keep)
    assert index.tolist() == expected
    assert index.dtype == torch.int32
    body_kept, body_index = run_function("TokenSelect", {"hidden": hidden, "score": score}, 2, keep=keep)
    assert body_index.tolist() == expected
    assert body_index.dtype == np.int32
    for row, chosen in enumerate(expected):
        np.testing.assert_array_equal(kept[row].numpy(), hidden[row, chosen])
        np.testing.assert_array_equal(body_kept[row], hidden[row, chosen])


def score_by_loop(query: np.ndarray, key: np.ndarray, start: int, count: int, scale: float) -> np.ndarray:
    batch, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    result = np.zeros((batch, count))
    for b in range(batch):
        for head in range(heads):
            for row in range(rows):
                logits = key[b, head // group].astype(np.float64) @ query[b, head, row].astype(np.float64) * scale
                weights = np.exp(logits - logits.max())
                result[b] += (weights / weights.sum())[start : start + count]
    return result / (heads * rows)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    rows=st.integers(1, 4),
    keys=st.integers(2, 30),
    half=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_score_is_the_mean_attention_of_its_rows(
    batch: int, groups: int, share: int, rows: int, keys: int, half: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    kind = np.float16 if half else np.float32
    query = rng.standard_normal((batch, groups * share, rows, 8)).astype(kind)
    key = rng.standard_normal((batch, groups, keys, 8)).astype(kind)
    start = int(rng.integers(0, keys - 1))
    count = int(rng.integers(1, keys - start + 1))
    expected = score_by_loop(query, key, start, count, 0.35)
    eager = ops.token_score(torch.from_numpy(query), torch.from_numpy(key), start, count, 0.35)
    assert eager.dtype == torch.float32
    (body,) = run_function("TokenScore", {"query": query, "key": key}, 1, start=start, count=count, scale=0.35)
    np.testing.assert_allclose(eager.numpy(), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(body, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["token_score", "token_select"])
def test_ops_pass_torchs_own_checks(name: str) -> None:
    samples = {
        "token_score": (torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), 1, 8, 0.3),
        "token_select": (torch.randn(2, 9, 5), torch.randn(2, 9), 4),
    }
    op = getattr(torch.ops.vtexport, name).default
    torch.library.opcheck(op, samples[name], test_utils=("test_schema", "test_faketensor"))
