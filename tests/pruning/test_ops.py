"""The pruning ops: the PyTorch op, a plain loop, the ONNX function body and the native CPU twin say the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.reference import methods
from vtexport.graph.domains import DOMAIN_VERSION, OPSET, PRUNING
from vtexport.graph.functions import attach_functions
from vtexport.native import kernels as native
from vtexport.pruning import ops


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


def slots(number: int) -> np.ndarray:
    """A count as the function bodies take it: a vector of that length, whose values are not read."""
    return np.full(number, -7, dtype=np.int32)


def orders(score: np.ndarray) -> list[list[int]]:
    """The tokens of each row from the best down."""
    found = []
    for row in score:
        ranked = [-np.inf if np.isnan(value) else value for value in row]
        found.append(sorted(range(len(row)), key=lambda i: (-ranked[i], i)))
    return found


# Few distinct values, so that ties are the rule; and the values that are not numbers.
scores = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, np.nan, np.inf, -np.inf])


@given(data=st.data(), batch=st.integers(1, 3), tokens=st.integers(1, 40))
def test_select_breaks_ties_by_index_everywhere(data: st.DataObject, batch: int, tokens: int) -> None:
    score = data.draw(arrays(np.float32, (batch, tokens), elements=scores.map(np.float32)))
    keep = data.draw(st.integers(1, tokens))
    hidden = np.random.default_rng(0).standard_normal((batch, tokens, 3)).astype(np.float32)
    expected = [sorted(order[:keep]) for order in orders(score)]
    kept, index, rank = ops.token_select(torch.from_numpy(hidden), torch.from_numpy(score), keep)
    assert index.tolist() == expected
    ranks = [[order.index(token) for token in range(tokens)] for order in orders(score)]
    assert rank.tolist() == ranks
    assert index.dtype == torch.int32
    body_kept, body_index, body_rank = run_function(
        "TokenSelect", {"hidden": hidden, "score": score, "keep": slots(keep)}, 3
    )
    assert body_index.tolist() == expected
    assert body_rank.tolist() == ranks
    assert body_index.dtype == body_rank.dtype == np.int32
    twin_kept, twin_index, twin_rank = native.token_select(torch.from_numpy(hidden), torch.from_numpy(score), keep)
    assert twin_index.tolist() == expected
    assert twin_rank.tolist() == ranks
    for row, chosen in enumerate(expected):
        for found in (kept.numpy(), body_kept, twin_kept.numpy()):
            np.testing.assert_array_equal(found[row], hidden[row, chosen])


@dataclass
class Scoring:
    """Inputs of TokenScore: rows that see the keys up to their place, some of which count."""

    feeds: dict[str, np.ndarray]
    count: int

    def tensors(self) -> list[torch.Tensor]:
        return [torch.from_numpy(array) for array in self.feeds.values()]

    def attention(self, scale: float) -> np.ndarray:
        """[B, H, R, V] by loops, in double."""
        query, key, places, start = self.feeds.values()
        batch, heads, rows, _ = query.shape
        found = np.zeros((batch, heads, rows, self.count))
        for b, head, row in np.ndindex(batch, heads, rows):
            seen = key[b, head // (heads // key.shape[1]), : max(places[b, row], 0) + 1].astype(np.float64)
            weights = np.exp(seen @ query[b, head, row].astype(np.float64) * scale)
            whole = np.zeros(key.shape[2])
            whole[: len(seen)] = weights / weights.sum()
            found[b, head, row] = whole[start[b] : start[b] + self.count]
        return found


@st.composite
def scorings(draw: st.DrawFn) -> Scoring:
    batch, groups, share, rows = (draw(st.integers(1, 3)) for _ in range(4))
    keys = draw(st.integers(3, 24))
    count = draw(st.integers(1, keys))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    kind = np.float16 if draw(st.booleans()) else np.float32
    counted = rng.random((batch, rows)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    feeds = {
        "query": rng.standard_normal((batch, groups * share, rows, 8)).astype(kind),
        "key": rng.standard_normal((batch, groups, keys, 8)).astype(kind),
        "places": np.where(counted, rng.integers(0, keys, (batch, rows)), -1),
        "start": rng.integers(0, keys - count + 1, batch),
    }
    return Scoring(feeds, count)


@given(case=scorings())
def test_score_is_the_mean_attention_of_the_rows_that_count(case: Scoring) -> None:
    counted = case.feeds["places"] >= 0
    attention = case.attention(0.35).mean(axis=1)
    expected = (attention * counted[..., None]).sum(axis=1) / np.maximum(counted.sum(axis=1), 1)[:, None]
    eager = ops.token_score(*case.tensors(), case.count, 0.35)
    assert eager.dtype == torch.float32
    (body,) = run_function("TokenScore", {**case.feeds, "count": slots(case.count)}, 1, scale=0.35)
    twin = native.token_score(*case.tensors(), case.count, 0.35)
    for found in (eager.numpy(), body, twin.numpy()):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@given(case=scorings(), data=st.data())
def test_score_heads_divides_and_averages_the_heads_that_look_most(case: Scoring, data: st.DataObject) -> None:
    counted = case.feeds["places"] >= 0
    batch, heads = case.feeds["query"].shape[:2]
    chosen = data.draw(st.integers(1, heads))
    rng = np.random.default_rng(1)
    divisor = rng.uniform(0.5, 4, (*counted.shape, case.count)).astype(np.float32)
    weighted = case.attention(0.35) / divisor[:, None]
    by_head = (weighted * counted[:, None, :, None]).sum(axis=2) / np.maximum(counted.sum(axis=1), 1)[:, None, None]
    expected = np.zeros((batch, case.count))
    for b in range(batch):
        sums = by_head[b].sum(axis=1)
        for head in sorted(range(heads), key=lambda h: (-sums[h], h))[:chosen]:
            expected[b] += by_head[b, head] / chosen
    eager = ops.token_score_heads(*case.tensors(), torch.from_numpy(divisor), case.count, 0.35, chosen)
    feeds = {**case.feeds, "divisor": divisor, "count": slots(case.count)}
    (body,) = run_function("TokenScoreHeads", feeds, 1, scale=0.35, heads=chosen)
    twin = native.token_score_heads(*case.tensors(), torch.from_numpy(divisor), case.count, 0.35, chosen)
    for found in (eager.numpy(), body, twin.numpy()):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


#: one key beats all others, or none does
SCALES = (2e-5, 0.125)


def beyond_fp16(scale: float) -> tuple[Scoring, np.ndarray]:
    """fp16 numbers whose products reach 10^6, where fp16 ends at 65,504; and the scores [B, V], in double."""
    rng = np.random.default_rng(3)
    query, key = (rng.normal(0, 120, (2, heads, rows, 64)).astype(np.float16) for heads, rows in ((4, 6), (2, 40)))
    products = np.repeat(key, 2, axis=1).astype(np.float64) @ query.swapaxes(2, 3)
    assert (np.abs(products) > np.finfo(np.float16).max).any()
    weights = np.exp(scale * (products - products.max(axis=2, keepdims=True)))
    score = (weights / weights.sum(axis=2, keepdims=True)).mean(axis=(1, 3))[:, 3:35]
    feeds = {"query": query, "key": key, "places": np.full((2, 6), 39), "start": np.array([3, 3])}
    return Scoring(feeds, score.shape[1]), score


@pytest.mark.parametrize("scale", SCALES)
def test_products_beyond_the_range_of_fp16_keep_the_right_tokens(scale: float) -> None:
    case, expected = beyond_fp16(scale)
    eager = ops.token_score(*case.tensors(), case.count, scale)
    (body,) = run_function("TokenScore", {**case.feeds, "count": slots(case.count)}, 1, scale=scale)
    twin = native.token_score(*case.tensors(), case.count, scale)
    hidden = torch.zeros(*expected.shape, 1)
    _, kept, _ = ops.token_select(hidden, torch.from_numpy(expected.astype(np.float32)), 8)
    for found in (eager, torch.from_numpy(body), twin):
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-7)
        assert torch.equal(ops.token_select(hidden, found, 8)[1], kept)


def rank_of(score: torch.Tensor) -> torch.Tensor:
    """The ranks of score [B, V], [B, V] int32."""
    return ops.token_select(score[..., None], score, 1)[2]


@given(
    tokens=st.integers(4, 40),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    share=st.sampled_from([0.1, 0.4, 1.0]),
    paper=st.booleans(),
    ties=st.booleans(),
    data=st.data(),
)
def test_recycle_is_density_peak_clustering_of_the_best_dropped(
    tokens: int, seed: int, spread: float, share: float, paper: bool, ties: bool, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, tokens - 2))
    rng = np.random.default_rng(seed)
    # A spread of 30 makes densities that fp32 cannot hold; their order must not suffer.
    hidden = (rng.standard_normal((2, tokens, 16)) * spread).astype(np.float32)
    score = rng.random((2, tokens)).astype(np.float32)
    if ties:
        score = np.round(score, 1)
    pool = int(0.3 * (tokens - keep)) + 1
    clusters = min(int(share * pool) + 1, pool)
    rank = rank_of(torch.from_numpy(score))
    eager = ops.token_recycle(torch.from_numpy(hidden), rank, keep, pool, clusters, paper)
    twin = native.token_recycle(torch.from_numpy(hidden), rank, keep, pool, clusters, paper)
    counts = {"keep": slots(keep), "pool": slots(pool), "clusters": slots(clusters)}
    body = run_function("TokenRecycle", {"hidden": hidden, "rank": rank.numpy(), **counts}, 3, paper=int(paper))
    for row in range(2):
        values = torch.from_numpy(score[row])
        kept = methods.best(values.tolist(), keep)
        wanted = methods.recycle(torch.from_numpy(hidden[row]), values, kept, pool, clusters, paper)
        for merged, centres, cluster in ([part.numpy() for part in eager], body, [part.numpy() for part in twin]):
            assert centres[row].tolist() == wanted.centres
            assert {i: int(c) for i, c in enumerate(cluster[row]) if c >= 0} == wanted.members
            np.testing.assert_allclose(merged[row], wanted.tokens.numpy(), rtol=1e-4, atol=1e-4 * spread)
    assert eager[1].dtype == eager[2].dtype == torch.int32


def test_recycle_merges_equal_tokens_without_nan() -> None:
    hidden, score = torch.ones(1, 9, 4), torch.zeros(1, 9)
    for recycle in (ops.token_recycle, native.token_recycle):
        merged, centres, cluster = recycle(hidden, rank_of(score), 2, 5, 2, False)
        # Every distance and density is equal: the lower places win throughout.
        assert centres.tolist() == [[2, 3]]
        assert cluster.tolist() == [[-1, -1, 0, 1, 0, 0, 0, -1, -1]]
        torch.testing.assert_close(merged, torch.ones(1, 2, 4))


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_twins_read_and_write_every_dtype(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, score = (torch.randn(2, 12, 8) * 3).to(kind), torch.rand(2, 12)
    for twin, eager in zip(native.token_select(hidden, score, 5), ops.token_select(hidden, score, 5), strict=True):
        assert twin.dtype == eager.dtype
        assert torch.equal(twin, eager)
    rank = rank_of(score)
    twins, eagers = (recycle(hidden, rank, 3, 7, 2, False) for recycle in (native.token_recycle, ops.token_recycle))
    assert twins[0].dtype == kind
    torch.testing.assert_close(twins[0], eagers[0])
    assert torch.equal(twins[1], eagers[1])
    assert torch.equal(twins[2], eagers[2])
    rating = (torch.randn(2, 4, 3, 8).to(kind), torch.randn(2, 2, 9, 8).to(kind))
    places, start = torch.tensor([[6, 7, 8], [0, -1, 8]]), torch.tensor([0, 1])
    scored = native.token_score(*rating, places, start, 6, 0.3)
    torch.testing.assert_close(scored, ops.token_score(*rating, places, start, 6, 0.3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_come_out_alike(value: float) -> None:
    """A logit that is NaN or infinitely great makes its row's attention, and so the scores, NaN; never a crash."""
    query, key = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 5, 4)
    key[0, 1, 3] = value
    rating = (query, key, torch.tensor([[3, 4]]), torch.tensor([0]), 3, 0.5)
    torch.testing.assert_close(native.token_score(*rating), ops.token_score(*rating), equal_nan=True)
    hidden, score = torch.randn(1, 6, 4), torch.tensor([[0.1, value, 0.3, value, 0.2, 0.3]])
    assert torch.equal(native.token_select(hidden, score, 3)[1], ops.token_select(hidden, score, 3)[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("paper", [False, True])
def test_recycling_numbers_that_are_none_stays_in_range(value: float, paper: bool) -> None:
    """Which tokens of such a row merge is open; the other rows of its batch must not notice."""
    torch.manual_seed(0)
    hidden, rank = torch.randn(2, 20, 8), rank_of(torch.rand(2, 20))
    keep, pool, clusters = 4, 12, 3
    whole = ops.token_recycle(hidden, rank, keep, pool, clusters, paper)
    hidden[0, 7:15, 3] = value
    counts = {"keep": slots(keep), "pool": slots(pool), "clusters": slots(clusters)}
    arrays = {"hidden": hidden.numpy(), "rank": rank.numpy(), **counts}
    for merged, centres, cluster in (
        ops.token_recycle(hidden, rank, keep, pool, clusters, paper),
        native.token_recycle(hidden, rank, keep, pool, clusters, paper),
        map(torch.from_numpy, run_function("TokenRecycle", arrays, 3, paper=int(paper))),
    ):
        assert 0 <= int(centres.min()) <= int(centres.max()) < 20
        assert -1 <= int(cluster.min()) <= int(cluster.max()) < clusters
        assert int((cluster[0] >= 0).sum()) == pool
        assert cluster[0, centres[0]].tolist() == list(range(clusters))
        torch.testing.assert_close(merged[1], whole[0][1])
        assert torch.equal(centres[1], whole[1][1])
        assert torch.equal(cluster[1], whole[2][1])


def test_twins_take_numpy_arrays() -> None:
    from vtexport import _native

    hidden, score = np.random.default_rng(0).random((1, 6, 3), np.float32), np.array([[3, 1, 4, 1, 5, 9]], np.float32)
    kept, index, rank = np.empty((1, 2, 3), np.float32), np.empty((1, 2), np.int32), np.empty((1, 6), np.int32)
    _native.Kernels().token_select(hidden, score, kept, index, rank)
    assert index.tolist() == [[4, 5]]
    np.testing.assert_array_equal(kept, hidden[:, 4:])
    assert rank.tolist() == [[3, 4, 2, 5, 1, 0]]


def test_twins_refuse_what_the_contract_refuses() -> None:
    hidden, score = torch.randn(1, 6, 4), torch.rand(1, 6)
    rank = rank_of(score)
    for call, message in {
        lambda: native.token_select(hidden, score, 7): "keep is out of range",
        lambda: native.token_select(hidden, score, 0): "keep is out of range",
        lambda: native.token_select(hidden.double(), score, 2): "hidden must be float32",
        lambda: native.token_select(hidden, score[:, :5], 2): r"score must be \[batch, tokens\]",
        lambda: native.token_recycle(hidden, rank, 3, 4, 1, False): "pool is out of range",
        lambda: native.token_recycle(hidden, rank, 3, 2, 3, False): "clusters is out of range",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    query, key = torch.randn(1, 3, 1, 4), torch.randn(1, 2, 5, 4)
    places, start = torch.tensor([[4]]), torch.tensor([0])
    with pytest.raises(ValueError, match="heads is not a multiple of key heads"):
        native.token_score(query, key, places, start, 3, 1.0)
    with pytest.raises(ValueError, match="count exceeds"):
        native.token_score(query[:, :2], key, places, start, 6, 1.0)
    with pytest.raises(ValueError, match="differ in shape"):
        native.token_score(query[:, :2], key[..., :3], places, start, 3, 1.0)


def samples() -> dict[str, tuple[object, ...]]:
    """Arguments for every op."""
    rating = (
        torch.randn(2, 4, 3, 8),
        torch.randn(2, 2, 9, 8),
        torch.tensor([[6, -1, 8]]).expand(2, -1).contiguous(),
        torch.tensor([0, 1]),
    )
    return {
        "token_score": (*rating, 6, 0.3),
        "token_score_heads": (*rating, torch.rand(2, 3, 6) + 1, 6, 0.3, 2),
        "token_select": (torch.randn(2, 9, 5), torch.randn(2, 9), 4),
        "token_recycle": (torch.randn(2, 9, 5), rank_of(torch.randn(2, 9)), 4, 3, 2, False),
    }


@pytest.mark.parametrize("name", samples())
def test_ops_pass_torchs_own_checks(name: str) -> None:
    op = getattr(torch.ops.vtexport, name).default
    torch.library.opcheck(op, samples()[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", samples())
def test_torch_compile_and_torch_export_go_through_the_ops(name: str) -> None:
    arguments = samples()[name]
    tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
    attributes = arguments[len(tensors) :]

    class Module(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> object:
            return getattr(ops, name)(*inputs, *attributes)

    expected = Module()(*tensors)
    torch.testing.assert_close(torch.compile(Module(), fullgraph=True, backend="aot_eager")(*tensors), expected)
    exported = torch.export.export(Module(), tuple(tensors))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert f"vtexport.{name}.default" in called
    torch.testing.assert_close(exported.module()(*tensors), expected)
