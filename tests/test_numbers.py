"""Numbers that are none: NaN and infinity are found where they arise, and named, instead of becoming an answer."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import BuildBundle, greedy, noise_images
from vtexport.builder.build import build
from vtexport.builder.options import BuildOptions
from vtexport.errors import ModelError, NumericError, VerificationError
from vtexport.graph.finite import check_arrays, check_records
from vtexport.models.checkpoint import Checkpoint
from vtexport.runtime.batch import Batch
from vtexport.runtime.generate import generate
from vtexport.runtime.request import Decoding
from vtexport.runtime.runner import Runner
from vtexport.serve.metrics import Metrics
from vtexport.serve.scheduler import End, Failure, Job, Scheduler, Token
from vtexport.targets.engine import VisionInput, VisionOutput

# Weights


def damaged(checkpoint: Path, folder: Path, ending: str, change: Callable[[torch.Tensor], Any]) -> tuple[Path, str]:
    """A copy of `checkpoint` in which `change` was done to the first tensor whose name ends so; and that name."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    return folder, name


def put(value: float, *places: tuple[int, ...]) -> Callable[[torch.Tensor], None]:
    """Put `value` at `places` of a tensor."""

    def change(tensor: torch.Tensor) -> None:
        for place in places:
            tensor[place] = value

    return change


@pytest.mark.parametrize(
    ("ending", "value", "dtype", "found"),
    [
        ("layers.1.mlp.down_proj.weight", float("nan"), "fp32", r"NaN at \[3, 5\]; the weights"),
        ("layers.0.self_attn.k_proj.weight", float("-inf"), "fp32", r"infinity at \[3, 5\]; the weights"),
        ("lm_head.weight", float("inf"), "fp16", r"infinity at \[3, 5\]; the weights"),
    ],
)
def test_a_weight_that_is_no_number_is_named_before_anything_is_compiled(
    tiny_checkpoint: Path, tmp_path: Path, ending: str, value: float, dtype: str, found: str
) -> None:
    folder, name = damaged(tiny_checkpoint, tmp_path / "model", ending, put(value, (3, 5)))
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor {name} holds {found}"):
        build(BuildOptions(str(folder), 0.5, dtype=dtype), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_that_no_graph_reads_may_be_anything(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """CLIP's layers behind the one that LLaVA reads are in the checkpoint, and in no engine."""
    last = "encoder.layers.2.mlp.fc1.weight"
    folder, _ = damaged(tiny_checkpoint, tmp_path / "model", last, put(float("nan"), (0, 0)))
    build(BuildOptions(str(folder), 0.5, dtype="fp32"), tmp_path / "out")


KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_type_is_judged_by_its_bits(kind: torch.dtype, tmp_path: Path) -> None:
    """The greatest and least numbers, subnormal ones and zeros of both signs are numbers; all else is found."""
    limits = torch.finfo(kind)
    numbers = torch.tensor([limits.max, limits.min, limits.smallest_normal / 4, -0.0, 0.0], dtype=torch.float64)
    # More than the piece that is read at a time, and not a multiple of it.
    tensor = numbers.to(kind).repeat(250_001)
    path = tmp_path / "some.safetensors"

    def check() -> int:
        save_file({"other": torch.full((3,), 2**31 - 1, dtype=torch.int32), "numbers": tensor}, path)
        read: list[int] = []
        check_records(Checkpoint.of_files(tmp_path, [path]).tensors.values(), read.append)
        return sum(read)

    assert check() == tensor.nbytes + 12
    places = [0, 600_000, len(tensor) - 1]
    for value in ("nan", "inf", "-inf"):
        if value != "nan" and kind == torch.float8_e4m3fn:
            continue  # a type without infinity
        for place in places:
            before = tensor[place].clone()
            tensor[place] = torch.tensor(float(value)).to(kind)
            word = "NaN" if value == "nan" else "infinity"
            with pytest.raises(
                ModelError, match=rf"tensor numbers holds {word} at \[{place}\]; the weights are damaged"
            ):
                check()
            tensor[place] = before
    tensor[places] = float("nan")
    with pytest.raises(ModelError, match=r"NaN at \[0\], the first of 3 such numbers"):
        check()


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"numbers": torch.ones(1000)}, path)
    records = Checkpoint.of_files(tmp_path, [path]).tensors.values()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(ModelError, match="ends inside tensor numbers"):
        check_records(records, lambda _bytes: None)


def test_tables_that_follow_from_the_configuration_are_checked() -> None:
    check_arrays({"rope.cos": np.ones(3, np.float32), "count": np.ones(3, np.int64)}, "model")
    with pytest.raises(ModelError, match=r"model: the table rope.cos that follows from config.json holds NaN"):
        check_arrays({"rope.cos": np.array([1, np.nan], np.float32)}, "model")


# Activations


def poisoned(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, stage: str, row: int, value: float, call: int = 1
) -> None:
    """Let call number `call` of a stage give `value` in one row, as a kernel does whose numbers overflow."""
    run, calls = getattr(runner.engine, stage), []

    def instead(*arguments: Any) -> Any:
        calls.append(stage)
        output = run(*arguments)
        if len(calls) == call:
            array = {"vision": lambda: output.seen().visual, "prefill": lambda: output.logits, "decode": lambda: output}
            array[stage]()[row, 1] = value
        return output

    monkeypatch.setattr(runner.engine, stage, instead)


def questions(number: int) -> list[tuple[Any, Any]]:
    texts = ("what digit is red?", "where is the 3 beside it?", "how many?")
    return list(zip(noise_images(number), texts, strict=False))


TARGETS = ("onnxruntime", "openvino")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("stage", "call", "found"),
    [
        ("vision", 1, "the vision stage gave NaN or infinity"),
        ("prefill", 1, "prefill gave NaN or infinity"),
        ("decode", 1, "decode step 1 gave NaN or infinity"),
    ],
)
def test_a_stage_that_gives_no_numbers_is_named_instead_of_an_answer(
    micro_bundle: Path, monkeypatch: pytest.MonkeyPatch, stage: str, call: int, found: str, value: float
) -> None:
    runner = Runner.open(micro_bundle, vision_cache=0)
    poisoned(runner, monkeypatch, stage, 1, value, call)
    with pytest.raises(NumericError, match=f"^{found} for question 2 of those asked together, so there is no answer"):
        runner.ask(questions(3), 6)
    monkeypatch.undo()
    poisoned(runner, monkeypatch, stage, 0, value, call)
    with pytest.raises(NumericError, match=f"^{found}, so there is no answer; build the bundle with --dtype fp32"):
        list(runner.stream(*questions(1)[0], 6))


def test_an_image_whose_tokens_are_no_numbers_is_not_given_away(
    micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner.open(micro_bundle, vision_cache=0)
    poisoned(runner, monkeypatch, "vision", 1, float("nan"))
    with pytest.raises(NumericError, match="the vision stage gave NaN or infinity for question 2"):
        runner.embed(questions(2))


def test_a_row_that_has_ended_may_go_on_as_it_likes(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose answers are over may stay in the batch, and nothing of them counts."""
    runner = Runner.open(micro_bundle, vision_cache=0)
    requests = [runner.request(*pair) for pair in questions(2)]
    whole = greedy(runner, requests, 6)
    ending = whole[0].token_ids[1]
    assert ending not in whole[1].token_ids
    # The first row ends with what the first decode step gives; the second step is the other row's alone.
    poisoned(runner, monkeypatch, "decode", 0, float("nan"), call=2)
    monkeypatch.setattr(runner.engine, "retain", lambda *_: False)
    results, _ = generate(runner.engine, runner.plan, requests, Decoding(6, 512, [ending]))
    assert [result.token_ids for result in results] == [whole[0].token_ids[:2], whole[1].token_ids]


@pytest.mark.parametrize("kept", [[3, 2], [2, 2], [2, 999]])
def test_kept_tokens_out_of_range_or_order_are_no_answer(
    micro_bundle: Path, monkeypatch: pytest.MonkeyPatch, kept: list[int]
) -> None:
    runner = Runner.open(micro_bundle, vision_cache=0)
    run = runner.engine.vision

    def instead(inputs: VisionInput) -> VisionOutput:
        output = run(inputs)
        array = output.seen().kept
        assert array is not None
        array[0, -2:] = kept
        return output

    monkeypatch.setattr(runner.engine, "vision", instead)
    with pytest.raises(NumericError, match=r"^the vision stage kept tokens out of range or order"):
        runner.ask(questions(1), 2)


@pytest.mark.parametrize("target", TARGETS)
def test_a_row_of_no_numbers_leaves_its_companions_and_successors_alone(build_bundle: BuildBundle, target: str) -> None:
    """Neither in its batch, nor in the memory that its cache leaves to later ones."""
    runner = Runner.open(build_bundle(method="sparsevlm", keep=0.25, target=target, self_check=False), vision_cache=0)
    requests = [runner.request(*pair) for pair in questions(3)]
    wanted = greedy(runner, requests, 6)
    arrays = {name: np.array(array) for name, array in runner.look(requests).arrays.items()}
    arrays["visual"][1, 3:5] = np.nan
    decoding = Decoding(8, 512)
    batch = Batch(runner.engine, runner.plan, requests, decoding, VisionOutput(arrays))
    assert [bool(fault) for fault in batch.faults] == [False, True, False]
    for step in range(6):
        for row in (0, 2):
            assert wanted[row].logits is not None
            np.testing.assert_array_equal(batch.logits[row], wanted[row].logits[step])
        batch.decode(batch.logits.argmax(axis=1))
    assert batch.faults[1] == "decode step 6 gave NaN or infinity"
    assert batch.retain(np.array([1, 2]))
    assert [bool(fault) for fault in batch.faults] == [True, False]
    other = Batch(runner.engine, runner.plan, requests[:1], decoding, runner.look(requests[:1]))
    assert other.join(batch)
    assert [bool(fault) for fault in other.faults] == [False, True, False]
    other.decode(other.logits.argmax(axis=1))
    assert other.faults == ["", "decode step 7 gave NaN or infinity", ""]
    del batch, other
    again = greedy(runner, requests, 6)
    for result, before in zip(again, wanted, strict=True):
        np.testing.assert_array_equal(result.logits, before.logits)


def test_where_a_decoder_breaks_is_told(build_bundle: BuildBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the scores of a debug build; else by the first layer whose keys are no numbers, where caches can be read."""
    plain = Runner.open(build_bundle(method="dense", keep=1.0, self_check=False), vision_cache=0)
    run = plain.engine.prefill

    def instead(*arguments: Any) -> Any:
        output = run(*arguments)
        for layer in (3, 4):
            output.cache.buffers[f"past.{layer}.key"][0, :, 2] = np.nan
        output.logits[0] = np.nan
        return output

    monkeypatch.setattr(plain.engine, "prefill", instead)
    with pytest.raises(NumericError, match=r"^prefill gave NaN or infinity, at the latest from decoder layer 3 on, so"):
        plain.ask(questions(1), 2)
    debug = Runner.open(build_bundle(method="sparsevlm", keep=0.25, debug=True, self_check=False), vision_cache=0)
    where = debug.plan.stages[0].where
    prefill = debug.engine.prefill

    def scored(*arguments: Any) -> Any:
        output = prefill(*arguments)
        output.stages[f"score.{debug.plan.stages[0].layer}"][0, 1] = np.inf
        return output

    monkeypatch.setattr(debug.engine, "prefill", scored)
    with pytest.raises(NumericError, match=f"^the scores of the pruning stage at {where} are NaN or infinity"):
        debug.ask(questions(1), 2)


def test_a_build_whose_numbers_overflow_says_which_dtype_helps(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder, _ = damaged(
        tiny_checkpoint,
        tmp_path / "model",
        "layers.1.mlp.down_proj.weight",
        lambda one: one.mul_(3e4 / one.abs().max()),
    )
    with pytest.raises(VerificationError, match=r"^in fp16, prefill gave NaN or infinity.*; build with --dtype fp32$"):
        build(BuildOptions(str(folder), 0.5, dtype="fp16"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_server_fails_the_row_alone(build_bundle: BuildBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rows that decode together, one becomes NaN: it fails as the server's fault, and the other is answered."""
    runner = Runner.open(build_bundle(method="sparsevlm", keep=0.25, self_check=False), vision_cache=0)
    poisoned(runner, monkeypatch, "decode", 1, float("nan"))
    events: list[list[Any]] = [[], []]
    jobs = [
        Job(runner.request(*pair), 6, (), time.monotonic() + 60, heard.append)
        for pair, heard in zip(questions(2), events, strict=True)
    ]
    scheduler = Scheduler(runner, 2, 0, Metrics())
    for job in jobs:
        scheduler.submit(job)
    scheduler.start()
    scheduler.stop()
    assert [event.token for event in events[0][:-1]] == greedy(runner, [jobs[0].request], 6)[0].token_ids
    assert events[0][-1] == End("length")
    assert [type(event) for event in events[1]] == [Token, Failure]
    assert events[1][-1].status == 500
    assert "decode step 1 gave NaN or infinity, so there is no answer" in events[1][-1].message
