"""The graph that only chooses visual tokens: what PyTorch and ONNX Runtime choose is what the reference keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import MICRO, family_checkpoint
from tests.conftest import noise_images
from vtexport.check.compare import Checked, sample_requests
from vtexport.check.reference import ReferenceModel, ReferenceVision
from vtexport.graph.eager import fill
from vtexport.graph.export import TracedGraph, trace_select
from vtexport.graph.select import SelectGraph
from vtexport.graph.weights import Weights
from vtexport.models import Checkpoint, Prompter, read_spec
from vtexport.models.rope import rope_tables
from vtexport.models.spec import ModelSpec, ViewChoice
from vtexport.pruning import Geometry, PruningPlan, make_plan, selection_plan
from vtexport.pruning.selection import rating_layer, selecting_stage
from vtexport.runtime.request import Request
from vtexport.targets.onnxruntime.lowering import LowerToContrib


@dataclass(frozen=True)
class Case:
    """A checkpoint (micro-llava's or a family's), the views asked for, and how tokens are chosen."""

    model: str
    method: str
    keep: float
    options: dict[str, object] = field(default_factory=dict)
    views: ViewChoice = field(default_factory=ViewChoice)


LATER: dict[str, object] = {"layers": "2", "recycle": False}
CASES = {
    "micro-fastv": Case("micro", "fastv", 0.25),
    "micro-sparsevlm": Case("micro", "sparsevlm", 0.33, LATER),
    "micro-pyramiddrop": Case("micro", "pyramiddrop", 0.5, {"layers": "3"}),
    "micro-combined": Case("micro", "fastervlm+fastv", 0.25),
    "first-layer": Case("llava", "fastv", 0.5, {"layers": "0"}),
    "several-stages-and-recycling": Case("llava", "sparsevlm", 0.5, {"layers": "1,2"}),
    "combined": Case("llava", "fastervlm+fastv", 0.5),
    "corrected-for-rope": Case("llava", "sparsevlm-plus", 0.7),
    "two-images": Case("llava", "sparsevlm", 0.6, LATER, ViewChoice(images=2)),
    "rows-that-differ": Case("llava_next-mistral", "sparsevlm", 0.8, LATER, ViewChoice(grid="2x2")),
    "two-images-that-differ": Case("llava_next-mistral", "fastv", 0.7, {}, ViewChoice(images=2, grid="2x1")),
    "biased-keys-of-the-next-layer": Case(
        "llava_onevision", "pyramiddrop", 0.6, {"layers": "1"}, ViewChoice(grid="2x2")
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a checkpoint; each is made once."""
    made = {"micro": MICRO}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = family_checkpoint(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


def plan_of(case: Case, spec: ModelSpec) -> PruningPlan:
    return selection_plan(make_plan(case.method, Geometry.of(spec), keep=case.keep, options=case.options))


def requests_of(folder: Path, spec: ModelSpec, plan: PruningPlan) -> list[Request]:
    """Prompts of several lengths; images that all lose other rows or columns, if the model unpads."""
    requests = sample_requests(Checked(folder, folder, spec), plan)
    if spec.views.tiles is None:
        return requests
    prompter, (rows, columns), found = Prompter(folder, spec), spec.views.tiles, []
    side, images = spec.vision.image_size, range(spec.views.images)
    for number, request in enumerate(requests):
        lost = [number * 9 % side if (number + image) % 2 else 0 for image in images]
        sizes = [(columns * side - one, rows * side - (0 if one else number)) for one in lost]
        pictures = [noise_images(1, size, seed=number)[0] for size in sizes]
        found.append(replace(request, views=prompter.views(pictures if len(pictures) > 1 else pictures[0])))
    return found


def tables_of(spec: ModelSpec) -> dict[str, np.ndarray]:
    """RoPE's tables by the names of the module."""
    return dict(zip(("rope.cos", "rope.sin"), (table.numpy() for table in rope_tables(spec)), strict=True))


def written(graph: TracedGraph, folder: Path, spec: ModelSpec, place: Path) -> ir.Model:
    """The graph with its weights in `place`."""
    Weights([graph.model], Checkpoint.open(folder), tables_of(spec)).write(place, lambda _bytes: None)
    return graph.model


def by_pytorch(folder: Path, spec: ModelSpec, plan: PruningPlan, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The module's outputs with the checkpoint's weights."""
    module = SelectGraph(spec, plan).eval()
    fill(module, load_file(folder / "model.safetensors"), tables_of(spec))
    with torch.inference_mode():
        return [out.numpy() for out in module(*(torch.from_numpy(feeds[name]) for name in module.input_names()))]


def by_onnxruntime(model: ir.Model, place: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The graph's outputs, compiled as the target `onnxruntime` compiles."""
    LowerToContrib()(model)
    ir.save(model, place / "select.onnx")
    session = ort.InferenceSession(place / "select.onnx", providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run([value.name for value in model.graph.outputs], feeds)
    return outputs


def feeds_of(requests: list[Request], visions: list[ReferenceVision], spec: ModelSpec) -> dict[str, np.ndarray]:
    """The inputs of a ragged batch."""
    lengths = np.array([len(request.prompt.token_ids) for request in requests])
    input_ids = np.zeros((len(requests), lengths.max()), dtype=np.int64)
    for row, request in zip(input_ids, requests, strict=True):
        row[: len(request.prompt.token_ids)] = request.prompt.token_ids
    at = np.array([request.prompt.image_positions for request in requests], dtype=np.int64)
    feeds = {
        "input_ids": input_ids,
        "image_position": at if at.shape[1] > 1 else at[:, 0],
        "text_length": lengths,
        "visual": np.concatenate([np.asarray(seen.visual) for seen in visions]),
    }
    if spec.views.counted:
        feeds["visual_length"] = np.array([seen.length for seen in visions], dtype=np.int64)
    return feeds


def check(outputs: list[np.ndarray], seen: ReferenceVision, kept: np.ndarray, row: int) -> None:
    """A row's chosen tokens are the rows of its visual tokens at `kept`, and are counted by image."""
    chosen, index, *length = outputs
    np.testing.assert_array_equal(index[row], [*kept, *[-1] * (index.shape[1] - len(kept))])
    np.testing.assert_array_equal(chosen[row, : len(kept)], np.asarray(seen.visual)[0, kept])
    ends = np.cumsum(seen.length)
    counted = [int(((kept >= end - count) & (kept < end)).sum()) for end, count in zip(ends, seen.length, strict=True)]
    assert [list(length[0][row])] == [counted] if length else sum(counted) == index.shape[1]


@pytest.mark.parametrize("name", CASES)
def test_it_chooses_what_the_reference_keeps(name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Prompts of several lengths in one batch; images of several sizes where the model takes them."""
    case = CASES[name]
    folder = checkpoint(case.model)
    spec = read_spec(folder, case.views)
    plan = plan_of(case, spec)
    reference, requests = ReferenceModel(folder, spec), requests_of(folder, spec, plan)
    visions = [reference.vision(request.views, plan) for request in requests]
    feeds = feeds_of(requests, visions, spec)
    model = written(trace_select(spec, plan, "fp32"), folder, spec, tmp_path)
    found = [by_pytorch(folder, spec, plan, feeds), by_onnxruntime(model, tmp_path, feeds)]
    stage, shorter = selecting_stage(plan), 0
    for row, (request, seen) in enumerate(zip(requests, visions, strict=True)):
        answer = reference.answer(request.prompt, seen.visual, (), plan, length=seen.length)
        kept = answer.kept[stage.where]
        shorter += len(kept) < stage.kept
        for outputs in found:
            check(outputs, seen, kept, row)
    assert len({len(request.prompt.token_ids) for request in requests}) > 1
    assert len({seen.length for seen in visions}) > 1 or not spec.views.newlines
    assert shorter or name != "rows-that-differ"


@pytest.mark.parametrize("name", ["micro-sparsevlm", "micro-pyramiddrop", "first-layer"])
def test_it_holds_no_weight_that_choosing_does_not_need(name: str, checkpoint: Callable[[str], Path]) -> None:
    case = CASES[name]
    spec = read_spec(checkpoint(case.model), case.views)
    plan = plan_of(case, spec)
    graph, last = trace_select(spec, plan, "fp16").model.graph, rating_layer(plan)
    assert last == int(str(case.options["layers"])) + (case.method == "pyramiddrop")
    rest = {"input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight"}
    layers: dict[int, set[str]] = {}
    for weight in graph.initializers:
        part, _, place = weight.partition(".layers.")
        number, _, own = place.partition(".")
        if place:
            layers.setdefault(int(number), set()).add(own)
        else:
            assert part in ("decoder.embed_tokens.weight", "rope.cos", "rope.sin")
    assert sorted(layers) == list(range(last + 1))
    assert set(SelectGraph(spec, plan).state_dict()) == set(graph.initializers)
    assert layers.pop(last) == rest
    assert all(rest < whole and len(whole) == 9 for whole in layers.values())


def test_embeddings_keep_the_dtype_that_the_vision_graph_gave_them() -> None:
    spec = read_spec(MICRO)
    for dtype, wanted in (("fp32", "FLOAT"), ("fp16", "FLOAT16"), ("bf16", "FLOAT")):
        graph = trace_select(spec, plan_of(CASES["micro-fastv"], spec), dtype).model.graph
        chosen, kept = graph.outputs
        assert (chosen.name, kept.name) == ("chosen", "kept")
        assert chosen.dtype.name == wanted
        assert [str(extent) for extent in chosen.shape] == ["batch", "36", str(spec.decoder.hidden_size)]
        assert kept.dtype == ir.DataType.INT32
