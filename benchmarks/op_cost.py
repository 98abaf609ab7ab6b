"""The cost of pruning itself: the ops of a plan alone, as the engines run them, on random states."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from vtexport.graph.domains import OPSET, PRUNING
from vtexport.graph.functions import attach_functions
from vtexport.models import ModelSpec
from vtexport.pruning import PruningPlan
from vtexport.pruning.schedule import Recycling

Feeds = dict[str, np.ndarray[Any, Any]]


def _node(op_type: str, feeds: Feeds, outputs: int, **attributes: int | float) -> Callable[[], None]:
    """A call of one node `vtexport::op_type` on ONNX Runtime."""
    values = [
        ir.Value(name=n, shape=ir.Shape(a.shape), type=ir.TensorType(ir.DataType.from_numpy(a.dtype)))
        for n, a in feeds.items()
    ]
    node = ir.node(op_type, values, attributes, domain=PRUNING, num_outputs=outputs)
    for number, value in enumerate(node.outputs):
        value.name = f"out{number}"
    model = ir.Model(ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": OPSET}, name="op"), ir_version=10)
    attach_functions(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def pruning_ms(spec: ModelSpec, plan: PruningPlan, text: int, runs: int = 50) -> float:
    """Median milliseconds of all scoring, selection and recycling that `plan` does for one image, batch 1."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape, dtype=np.float32)

    calls = []
    for stage in plan.stages:
        visual = stage.tokens_in
        if stage.layer is None:
            heads, groups, size = spec.vision.num_heads, spec.vision.num_heads, spec.vision.head_size
            rows, keys, width, first = 1, visual + 1, spec.vision.hidden_size, 1
        else:
            d = spec.decoder
            heads, groups, size = d.num_heads, d.num_kv_heads, d.head_size
            rows, keys, width, first = text, visual + text, d.hidden_size, 4
        score = {
            "query": random(1, heads, rows, size),
            "key": random(1, groups, keys, size),
            "places": np.full((1, rows), keys - 1),
            "start": np.full(1, first),
        }
        hidden = random(1, visual, width)
        calls.append(_node("TokenScore", score, 1, count=visual, scale=size**-0.5))
        scored = {"hidden": hidden, "score": rng.random((1, visual), dtype=np.float32)}
        calls.append(_node("TokenSelect", scored, 3, keep=stage.kept))
        if stage.recycled:
            pool, clusters = Recycling().counts(visual - stage.kept)
            counts = {"keep": stage.kept, "pool": pool, "clusters": clusters, "paper": 0}
            ranked = {"hidden": hidden, "rank": rng.permutation(visual).astype(np.int32)[None]}
            calls.append(_node("TokenRecycle", ranked, 3, **counts))
    times = []
    for number in range(runs + 5):
        began = time.perf_counter()
        for call in calls:
            call()
        if number >= 5:
            times.append(1000 * (time.perf_counter() - began))
    return median(times)
