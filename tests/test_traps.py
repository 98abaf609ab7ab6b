"""The traps that released pruning code fell into, each a test named after it."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vtexport
from tests.checkpoints import random_clip
from tests.conftest import BuildBundle, greedy, noise_images
from vtexport.measure import profile as profiling
from vtexport.pruning import METHODS, Geometry, VisionMethod, make_plan, ops
from vtexport.pruning.layout import Layout
from vtexport.pruning.raters import text_raters
from vtexport.pruning.vision import TowerLayer, TowerState, prune
from vtexport.runtime.generate import generate
from vtexport.runtime.request import Decoding, Request
from vtexport.runtime.runner import Runner

QUESTIONS = ("how many?", "what digit is red, and where is the 3 beside <image> it?", "<image> where?")
KEEP = 0.6
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def runner(tiny_checkpoint: Path, build_bundle: BuildBundle) -> Runner:
    return Runner.open(build_bundle(tiny_checkpoint, KEEP, "sparsevlm", debug=True))


@pytest.fixture(scope="module")
def requests(runner: Runner) -> list[Request]:
    return [runner.request(image, text) for image, text in zip(noise_images(3), QUESTIONS, strict=True)]


def test_trap_batch_size_1_only(runner: Runner, requests: list[Request]) -> None:
    together = greedy(runner, requests, NEW_TOKENS)
    for request, row in zip(requests, together, strict=True):
        (alone,) = greedy(runner, [request], NEW_TOKENS)
        assert alone.token_ids == row.token_ids
        np.testing.assert_allclose(alone.logits, row.logits, atol=1e-4)
        assert {k: v.tolist() for k, v in alone.kept.items()} == {k: v.tolist() for k, v in row.kept.items()}
        for name in alone.debug:
            if name.startswith("cluster"):
                np.testing.assert_array_equal(alone.debug[name], row.debug[name])
        # What pads the shorter prompts of the batch never rates.
        length = len(request.prompt.token_ids)
        np.testing.assert_array_equal(alone.debug["raters"], row.debug["raters"][:length])
        assert not row.debug["raters"][length:].any()


def test_trap_35_576_611_664_hard_coded() -> None:
    found = []
    for path in Path(vtexport.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and type(node.value) is int and node.value in (35, 576, 611, 664):
                found.append((path.name, node.value))
    # The one place where 576 belongs: the geometry that the released schedules are for.
    assert found == [("schedule.py", 576)]


@pytest.mark.parametrize("words", [1, 4])
def test_trap_no_rater_gives_nan_and_an_arbitrary_top_k(words: int) -> None:
    visual = torch.randn(1, 5, 8)
    text = torch.randn(1, 1, 8).expand(1, words + 2, 8)
    after = torch.tensor([[False] + [True] * words + [False]])
    # One word, or words all alike: none stands out, so all rate.
    raters = text_raters(visual, text, after)
    assert torch.equal(raters, after)
    query, key = torch.randn(1, 2, words + 2, 4), torch.randn(1, 2, 9, 4)
    places = torch.arange(words + 2)[None] + 5
    score = ops.token_score(query, key, places.clamp(max=8).masked_fill(~raters, -1), torch.tensor([1]), 5, 0.5)
    assert torch.isfinite(score).all()
    assert (score > 0).all()
    # A prompt without any text behind the image has nobody to ask: scores of zero, the first tokens stay.
    nobody = text_raters(visual, text, torch.zeros_like(after))
    assert not nobody.any()
    score = ops.token_score(query, key, places.masked_fill(~nobody, -1), torch.tensor([1]), 5, 0.5)
    assert ops.token_select(visual, score, 3)[1].tolist() == [[0, 1, 2]]


def test_trap_random_density_noise(runner: Runner, requests: list[Request]) -> None:
    first, second = greedy(runner, requests, NEW_TOKENS), greedy(runner, requests, NEW_TOKENS)
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.logits, two.logits)
        assert any(name.startswith("cluster") for name in one.debug)
        for name in one.debug:
            np.testing.assert_array_equal(one.debug[name], two.debug[name])


def test_trap_all_of_l_x_l_attention_materialised_to_read_a_few_rows(runner: Runner) -> None:
    folder = runner.bundle.folder
    graph = onnx.load(folder / "engine/language.onnx", load_external_data=False).graph
    shapes = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    scoring = [node for node in graph.node if node.op_type == "TokenScore"]
    assert len(scoring) == len(runner.plan.decoder_stages)
    for node in scoring:
        # Queries of text rows only; keys of all rows.
        assert shapes[node.input[0]][2] == "text"
        assert shapes[node.input[1]][2] != "text"
    # The attention that makes the hidden states is the runtime's fused kernel, in every layer.
    assert sum(node.op_type == "GroupQueryAttention" for node in graph.node) == runner.plan.num_layers


def test_trap_timing_that_leaves_out_the_vision_tower_or_the_selection(runner: Runner) -> None:
    lane = profiling._Lane(runner.bundle.folder, "", profiling.Settings(new_tokens=2))
    lane.run(record=True)
    parts = sum(lane.times[name][0] for name in ("preprocess", "vision", "prefill"))
    assert lane.times["first_token"][0] == pytest.approx(parts)
    assert all(lane.times[name][0] > 0 for name in ("preprocess", "vision", "prefill"))
    # Scoring, selection and recycling are nodes of the timed graph, not steps around it.
    graph = onnx.load(runner.bundle.folder / "engine/language.onnx", load_external_data=False).graph
    assert {"TokenScore", "TokenSelect", "TokenRecycle"} <= {node.op_type for node in graph.node}


class Recording:
    """An engine that notes what decoding is told, and how many tokens each layer's cache has."""

    def __init__(self, runner: Runner) -> None:
        self.engine = runner.engine
        self.lengths: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.filled: list[int] = []

    def admit(self, rows, text, new_tokens):
        self.engine.admit(rows, text, new_tokens)

    def vision(self, inputs):
        return self.engine.vision(inputs)

    def prefill(self, inputs, new_tokens, bucket=0):
        out = self.engine.prefill(inputs, new_tokens, bucket)
        self.filled = [buffer.shape[2] - new_tokens for buffer in list(out.cache.buffers.values())[::2]]
        return out

    def decode(self, cache, tokens, length, position):
        self.lengths.append(length.copy())
        self.positions.append(position.copy())
        return self.engine.decode(cache, tokens, length, position)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_trap_decode_positions_that_ignore_per_layer_cache_lengths(
    positions: str, tiny_checkpoint: Path, build_bundle: BuildBundle
) -> None:
    options = {"positions": positions}
    runner = Runner.open(build_bundle(tiny_checkpoint, KEEP, "sparsevlm", method_options=options, self_check=False))
    requests = [runner.request(image, text) for image, text in zip(noise_images(3), QUESTIONS, strict=True)]
    recording = Recording(runner)
    generate(recording, runner.plan, requests, Decoding(3, 512))  # type: ignore[arg-type]
    text = np.array([len(request.prompt.token_ids) for request in requests])
    assert len(set(runner.plan.per_layer)) > 1
    for step, (length, position) in enumerate(zip(recording.lengths, recording.positions, strict=True)):
        for layer, visual in enumerate(runner.plan.per_layer):
            assert length[layer].tolist() == (text + visual + step).tolist()
            own = visual if positions == "compact" else runner.plan.num_visual_tokens
            assert position[layer].tolist() == (text + own + step).tolist()


def test_trap_the_kv_of_the_layer_before_pruning_appended_twice(
    tiny_checkpoint: Path, build_bundle: BuildBundle
) -> None:
    runner = Runner.open(build_bundle(tiny_checkpoint, 0.8, "fastv", self_check=False))
    request = runner.request(noise_images(1)[0], QUESTIONS[1])
    recording = Recording(runner)
    generate(recording, runner.plan, [request], Decoding(2, 512))  # type: ignore[arg-type]
    text, visual = len(request.prompt.token_ids), runner.plan.num_visual_tokens
    kept = runner.plan.decoder_stages[1].kept
    assert recording.filled == [text + visual, text + visual, text + kept]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dense"])
def test_trap_pruning_silently_switched_off(
    method: str, tiny_checkpoint: Path, build_bundle: BuildBundle, tmp_path: Path
) -> None:
    # fastv's two unpruned layers of three leave it little to choose from.
    keep = 0.8 if method == "fastv" else KEEP
    own = {"clip": str(random_clip(tmp_path, 5, 48))} if method == "cdpruner" else {}
    runner = Runner.open(build_bundle(tiny_checkpoint, keep, method, method_options=own, self_check=False))
    recording = Recording(runner)
    request = runner.request(noise_images(1)[0], QUESTIONS[0])
    if runner.given:
        request = replace(request, extras={"ranking": np.arange(25, dtype=np.float32)})
    generate(recording, runner.plan, [request], Decoding(2, 512))  # type: ignore[arg-type]
    # What the caches really hold, not what the plan says.
    held = [filled - len(request.prompt.token_ids) for filled in recording.filled]
    total = runner.plan.num_visual_tokens
    assert held == list(runner.plan.per_layer)
    assert sum(held) / len(held) <= keep * total + 1.5
    assert held[-1] < total


class Fixed:
    """A projector that costs what LLaVA-1.5-7B's does."""

    weight = torch.empty(4096, 1024, device="meta")
    second = torch.empty(4096, 4096, device="meta")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(torch.nn.functional.linear(x, self.weight), self.second)


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if issubclass(m, VisionMethod) and m.name != "dense"])
def test_trap_selection_slower_than_what_it_saves(method: str) -> None:
    # Counted, not timed: at LLaVA-1.5-7B's size selection costs at most a hundredth of the prefill FLOPs it saves.
    own = {"clip": "given"} if method == "cdpruner" else {}
    plan = make_plan(method, Geometry(576, 32, tower_layers=23), keep=0.25, options=own)
    layer = TowerLayer(torch.empty(1, 16, 1, 64, device="meta"), torch.empty(1, 16, 577, 64, device="meta"))
    features = torch.empty(1, 577, 1024, device="meta")
    relevance = torch.empty(1, 576, device="meta")
    state = TowerState(features, [layer] * 23, 0.125, 24, Fixed(), relevance)
    constants: dict[str, Any] = {
        name: torch.empty(array.shape, dtype=torch.from_numpy(array[:0]).dtype, device="meta")
        for name, array in plan.methods.vision.constants(plan, 24).items()
    }

    def flops(kept: int) -> float:
        n = kept + 64
        return 32 * 2 * (4 * n * 4096**2 + 2 * n * n * 4096 + 3 * n * 4096 * 11008)

    with FlopCounterMode(display=False) as counter:
        prune(plan, state, constants)
    saved = flops(576) - flops(plan.vision_tokens)
    assert counter.get_total_flops() <= 0.01 * saved


def test_trap_unequal_output_lengths_compared_as_speed(
    runner: Runner, tiny_checkpoint: Path, build_bundle: BuildBundle
) -> None:
    other = build_bundle(tiny_checkpoint, 1.0, "dense")
    settings = profiling.Settings(new_tokens=5)
    report_lanes = [profiling._Lane(folder, "", settings) for folder in (runner.bundle.folder, other)]
    for lane in report_lanes:
        lane.run(record=True)
    # Five tokens are four steps on either side, whatever end tokens say.
    assert [len(lane.times["per_token"]) for lane in report_lanes] == [4, 4]


def test_a_layout_puts_text_and_image_where_they_belong() -> None:
    layout = Layout(torch.tensor([[1], [3]]), torch.tensor([4, 3]), 4, 0)
    shown = replace(layout, visual=2)
    text = torch.arange(4.0)[None, :, None].expand(2, -1, 1)
    rows = layout.with_visual(text, -torch.ones(2, 2, 1) * torch.tensor([[1.0], [2.0]]), shown)[..., 0]
    assert rows.tolist() == [[0, -1, -2, 1, 2, 3], [0, 1, 2, -1, -2, 3]]
    assert shown.last_place().tolist() == [5, 4]
    assert shown.text_places().tolist() == [[0, 3, 4, 5], [0, 1, 2, 5]]
    assert shown.after_image().tolist() == [[False, True, True, True], [False, False, False, False]]
    assert shown.visual_of(rows[..., None])[..., 0].tolist() == [[-1, -2], [-1, -2]]
    less = shown.with_visual(rows[..., None], rows[:, :0, None], layout)[..., 0]
    assert less.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
