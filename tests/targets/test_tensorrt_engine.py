"""The TensorRT runner, on a stand-in for TensorRT that runs the graphs it would parse (`tests.targets.stand_in`)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.targets import stand_in
from vtexport.builder.build import build
from vtexport.builder.options import BuildOptions
from vtexport.bundle.folder import Bundle
from vtexport.errors import InputError, TargetError
from vtexport.micro import heldout
from vtexport.pruning.decoder import slots
from vtexport.runtime.generate import Generation, generate
from vtexport.runtime.inputs import look
from vtexport.runtime.request import Decoding, Request
from vtexport.runtime.runner import Runner
from vtexport.targets.base import Compiled
from vtexport.targets.language import LANGUAGE
from vtexport.targets.tensorrt import child, engine, plan, rtx, target
from vtexport.targets.tensorrt.bindings import Bindings
from vtexport.targets.tensorrt.gpu import OnGpu

pytest.importorskip("tensorrt_rtx_bindings", reason="the extra tensorrt-rtx is not installed")
LIMITS = {"sm": "89", "max_batch": 3, "max_text": 64}


class Machine:
    """A machine with a GPU and TensorRT for RTX, both stand-ins."""

    def __init__(self, patch: pytest.MonkeyPatch, cache: Path, captures_itself: bool = False) -> None:
        self.trt, self.gpu = stand_in.TensorRT(captures_itself), stand_in.Gpu()
        self.gpu.trt = self.trt
        self.bindings = Bindings(self.trt, stand_in.Logger())
        for module in (target, rtx):
            patch.setattr(module, "this_gpu", lambda: target.Device("RTX Test", 89))
        patch.setattr(rtx.TensorRTRTXTarget, "bindings", classmethod(lambda _cls: self.bindings))
        patch.setattr(engine, "Gpu", lambda: self.gpu)
        patch.setattr(child, "compile_apart", stand_in.compile_apart)
        patch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def debug_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Sparsevlm on micro-llava in fp16, with debug outputs, checked against the reference as it was built."""
    folder = tmp_path_factory.mktemp("stand-in")
    with pytest.MonkeyPatch.context() as patch:
        Machine(patch, folder)
        options = BuildOptions(
            "micro-llava", 0.44, "sparsevlm", "tensorrt-rtx", "fp16", debug=True, target_options=LIMITS
        )
        yield build(options, folder / "bundle")


@pytest.fixture(scope="module")
def auto_bundles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bundle, Bundle]]:
    """A bundle with two buckets for the stand-in, and the same for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("stand-in")
    with pytest.MonkeyPatch.context() as patch:
        Machine(patch, folder)
        options = BuildOptions(
            "micro-llava",
            "auto",
            "sparsevlm",
            "tensorrt-rtx",
            "fp32",
            buckets=(0.5, 0.25),
            target_accuracy=0.9,
            self_check=False,
            target_options=LIMITS,
        )
        other = replace(options, target="onnxruntime", target_options={})
        yield build(options, folder / "bundle"), build(other, folder / "other")


QUESTIONS = ("what digit is red?", "what?", "how many digits are there?")


def answers(runner: Runner, requests: list[Request], bucket: int = 0) -> list[Any]:
    """Tokens and kept visual tokens of `requests` under plan number `bucket`; no end token cuts them short."""
    decoding = Decoding(6, runner.bundle.manifest.model.max_positions)
    results, _ = generate(runner.engine, runner.plans[bucket], requests, decoding, bucket=bucket)
    return [(r.token_ids, {where: kept.tolist() for where, kept in r.kept.items()}) for r in results]


def requests(runner: Runner, number: int) -> list[Request]:
    """Held-out images of micro-llava's, with questions of different lengths."""
    images = [example.image for example in heldout.examples(4 * number)][::4]
    return [runner.request(Image.fromarray(image), text) for image, text in zip(images, QUESTIONS, strict=False)]


def test_a_build_is_checked_on_the_plans(debug_bundle: Bundle) -> None:
    checked = debug_bundle.manifest.verification
    assert checked is not None
    assert checked.ran == "tensorrt-rtx"
    assert checked.same_kept
    assert checked.same_tokens


@pytest.mark.parametrize("captures_itself", [False, True])
def test_rows_are_answered_alike_whatever_was_asked_before(
    captures_itself: bool, debug_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Short after long, a larger batch after a smaller one: each as by an engine that was never asked anything."""
    machine = Machine(monkeypatch, tmp_path, captures_itself)
    runner = Runner.open(debug_bundle.folder)
    asked = requests(runner, 3)
    lengths = [len(request.prompt.token_ids) for request in asked]
    assert len(set(lengths)) > 1
    alone = [answers(Runner.open(debug_bundle.folder), [request])[0] for request in asked]
    machine.gpu.captures = 0
    for order in ([0], [1], [2, 0, 1], [1], [0, 2], [2], [1, 0, 2]):
        assert answers(runner, [asked[n] for n in order]) == [alone[n] for n in order]
    # Once for each size of batch; TensorRT for RTX captures by itself.
    assert machine.gpu.captures == (0 if captures_itself else 3)
    graphs = {context.settings.cuda_graph_strategy.name for context in machine.trt.contexts}
    assert graphs == {"WHOLE_GRAPH_CAPTURE" if captures_itself else "DISABLED"}


def test_every_bucket_is_a_profile_of_the_language_plan(auto_bundles: tuple[Bundle, Bundle], machine: Machine) -> None:
    ours, other = (Runner.open(bundle.folder) for bundle in auto_bundles)
    assert set(ours.bundle.manifest.target.graphs) == {"vision", LANGUAGE}
    for bucket in (1, 0, 1):
        assert answers(ours, requests(ours, 3), bucket) == answers(other, requests(other, 3), bucket)
    assert set(machine.trt.runs) == {0, 1, 2}
    # One context per bucket, one for the lane that decodes, and one for vision; a plan's all on the same working memory.
    assert len(machine.trt.contexts) == 4
    assert len({context.memory for context in machine.trt.contexts}) == 2


def test_answers_that_are_made_at_the_same_time_have_caches_of_their_own(
    debug_bundle: Bundle, machine: Machine
) -> None:
    runner = Runner.open(debug_bundle.folder)
    asked = requests(runner, 2)
    wanted = [answers(runner, [request])[0][0] for request in asked]
    both = [Generation(runner.engine, runner.plan, [request], Decoding(6, 512)) for request in asked]
    steps = [iter(generation) for generation in both]
    for _ in range(6):
        for step in steps:
            next(step, None)
    assert [generation.results[0].token_ids for generation in both] == wanted
    lanes = [id(generation._batch.cache.lane) for generation in both]
    assert lanes[0] != lanes[1]
    del both, steps
    gc.collect()
    third = Generation(runner.engine, runner.plan, asked[:1], runner.decoding(2))
    assert id(third._batch.cache.lane) in lanes


def test_rows_that_have_ended_stay_in_their_lane(debug_bundle: Bundle, machine: Machine) -> None:
    """The graph that was captured is for one size of batch."""
    runner = Runner.open(debug_bundle.folder)
    asked = requests(runner, 3)
    free = [ids for ids, _ in answers(runner, asked)]
    end = next(token for token in free[0][1:] if any(token not in ids for ids in free))
    decoding = Decoding(len(free[0]), 512, eos_token_ids=(end,))
    generation = Generation(runner.engine, runner.plan, asked, decoding)
    size = generation.timings.cache_bytes
    for _ in generation:
        assert generation.timings.cache_bytes == size
    for result, ids in zip(generation.results, free, strict=True):
        assert result.token_ids == (ids[: ids.index(end) + 1] if end in ids else ids)


def test_a_step_binds_nothing_anew(debug_bundle: Bundle, machine: Machine) -> None:
    runner = Runner.open(debug_bundle.folder)
    asked = requests(runner, 1)
    answers(runner, asked)
    bound = machine.trt.bound
    answers(runner, asked)
    prefill = len(runner.engine.plan(LANGUAGE).inputs) + len(runner.engine.plan("vision").inputs)
    assert machine.trt.bound - bound == prefill
    assert machine.gpu.replays > 3


def test_without_captured_graphs_it_goes_on(debug_bundle: Bundle, machine: Machine) -> None:
    runner = Runner.open(debug_bundle.folder)
    wanted = answers(runner, requests(runner, 2))
    again = Runner.open(debug_bundle.folder)
    machine.gpu.capturable, machine.gpu.replays = False, 0
    for _ in range(2):
        assert answers(again, requests(again, 2)) == wanted
    assert machine.gpu.replays == 0


def test_visual_tokens_stay_on_the_gpu(debug_bundle: Bundle, machine: Machine) -> None:
    runner = Runner.open(debug_bundle.folder)
    seen = look(runner.engine, runner.plan, requests(runner, 2))
    assert isinstance(seen.arrays["visual"], OnGpu)
    rows = seen.rows(np.array([1, 0])).seen().visual
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(seen.seen().visual)[::-1])
    assert rows.shape == (2, 144, runner.spec.decoder.hidden_size)


def test_debug_outputs_come_through(debug_bundle: Bundle, machine: Machine) -> None:
    """Raters are bool."""
    runner = Runner.open(debug_bundle.folder)
    results, _ = generate(runner.engine, runner.plan, requests(runner, 2), runner.decoding(2))
    raters = results[0].debug["raters"]
    assert raters.dtype == bool
    assert raters.any()
    layer = next(iter(runner.plan.decoder_stages))
    assert results[0].debug[f"score.decoder.{layer}"].shape == (144,)


@pytest.mark.parametrize(
    ("rows", "text", "new", "message"),
    [
        (4, 20, 4, r"at most 3 prompts per batch, not 4; .* build it again with --max-batch 4"),
        (1, 60, 8, r"at most 64 text tokens of prompt and answer together, not 60 \+ 8; .*--max-text 68"),
    ],
)
def test_what_a_bundle_has_no_room_for_is_refused_before_anything_runs(
    rows: int, text: int, new: int, message: str, debug_bundle: Bundle, machine: Machine
) -> None:
    runner = Runner.open(debug_bundle.folder)
    prompts = [replace(r, prompt=replace(r.prompt, token_ids=[5] * text)) for r in requests(runner, 1)]
    with pytest.raises(InputError, match=message):
        runner.generate(prompts * rows, runner.decoding(new))
    with pytest.raises(InputError, match=message):
        Generation(runner.engine, runner.plan, prompts * rows, runner.decoding(new))
    assert machine.trt.runs == []


def test_the_command_refuses_in_one_line(debug_bundle: Bundle, machine: Machine, vtexport, photo: Path) -> None:
    question = ("run", debug_bundle.folder, "--image", photo, "--prompt", "what digit is red?")
    outcome = vtexport(*question, "--max-new-tokens", "90")
    assert outcome.code == 2
    assert outcome.err.startswith("error: this bundle was built for at most 64 text tokens")
    assert len(outcome.err.splitlines()) == 1
    assert vtexport(*question, "--max-new-tokens", "4").code == 0
    assert machine.trt.runs


def test_a_shape_outside_the_profile_never_runs_in_the_shape_before(debug_bundle: Bundle, machine: Machine) -> None:
    runner = Runner.open(debug_bundle.folder)
    answers(runner, requests(runner, 1))
    language, ran = runner.engine.plan(LANGUAGE), len(machine.trt.runs)
    with machine.gpu.working():
        shapes = {name: [1 if size < 0 else size for size in language.extent(name)] for name in language.inputs}
        shapes |= {"input_ids": [1, 900], "visual": [1, 144, runner.spec.decoder.hidden_size]}
        shapes |= {name: [length] for name, length in slots(runner.plans, runner.plan).items()}
        feeds = {name: machine.gpu.zeros(shape, language.kinds[name]) for name, shape in shapes.items()}
        with pytest.raises(TargetError, match=r"takes input_ids of \[1, 1\] to \[3, 64\], not \[1, 900\]"):
            language.run(0, feeds)
        feeds["input_ids"] = machine.gpu.zeros([1, 9], torch.int32)
        with pytest.raises(TargetError, match=r"takes input_ids as torch.int64, not torch.int32"):
            language.run(0, feeds)
    assert len(machine.trt.runs) == ran


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("deserialise", "TensorRT cannot load .*vision.plan.*the plan is of another version.*build the bundle again"),
        ("context", "TensorRT cannot run .*out of memory.*free memory on this GPU"),
        ("run", "TensorRT failed to run .*the context is not complete"),
    ],
)
def test_what_tensorrt_answers_is_believed(fault: str, message: str, debug_bundle: Bundle, machine: Machine) -> None:
    runner = Runner.open(debug_bundle.folder)
    machine.trt.fails.add(fault)
    with pytest.raises(TargetError, match=message):
        answers(runner, requests(runner, 1))


def test_too_little_memory_is_a_clear_error_and_idle_caches_make_room(debug_bundle: Bundle, machine: Machine) -> None:
    runner = Runner.open(debug_bundle.folder)
    wanted = answers(runner, requests(runner, 3))
    answers(runner, requests(runner, 1))
    gc.collect()
    # No room for another size of batch, until the caches of the others are given up.
    machine.gpu.full = True
    assert answers(runner, requests(runner, 2)) == wanted[:2]
    gc.collect()
    fresh = Runner.open(debug_bundle.folder)
    fresh.engine.load()
    machine.gpu.full = True
    with pytest.raises(TargetError, match=r"out of memory; .*--max-batch"):
        answers(fresh, requests(fresh, 1))


def test_plans_are_read_in_pieces(debug_bundle: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_PIECE", 4096)
    runner = Runner.open(debug_bundle.folder)
    runner.engine.load()
    assert machine.trt.largest_read == 4096


def test_kernels_that_rtx_compiled_are_kept(
    debug_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for _ in range(2):
        machine = Machine(monkeypatch, tmp_path, captures_itself=True)
        runner = Runner.open(debug_bundle.folder)
        answers(runner, requests(runner, 1))
        del runner, machine
        gc.collect()
    kept = sorted((tmp_path / "vtexport" / "tensorrt-rtx").iterdir())
    assert [file.read_bytes() for file in kept] == [b"kernels;kernels;"] * 2  # of vision and language, both times


def test_layers_are_timed_and_then_no_more(debug_bundle: Bundle, machine: Machine) -> None:
    runner = Runner.open(debug_bundle.folder)
    asked = requests(runner, 1)
    wanted = answers(runner, asked)
    times = runner.engine.layer_times(lambda: answers(runner, asked))
    assert set(times) == {"vision", "prefill", "decode"}
    assert times["prefill"] == {"layer of profile 0": 0.25}
    assert times["decode"]["layer of profile 1"] > 0.25
    assert answers(runner, asked) == wanted
    assert all(context.profiler is None for context in machine.trt.contexts[-3:])
    assert set(runner.engine.device_times()) == {"vision", "prefill", "decode"}


def test_plans_of_an_older_vtexport_are_refused(debug_bundle: Bundle, machine: Machine) -> None:
    target_ = debug_bundle.target()
    old = Compiled({"vision": "v", "prefill": "p", "decode": "d"}, debug_bundle.manifest.target.versions)
    with pytest.raises(TargetError, match="built by an older vtexport, with a plan per stage; build it again"):
        target_.open(debug_bundle.folder, old, debug_bundle.manifest.pruning_plans(), 0)
