"""The host's side of pruning inside TensorRT-LLM's decoder: lengths, who dropped what, and packed rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import MICRO, family_checkpoint
from vtexport.errors import BundleError, VerificationError
from vtexport.models import read_spec
from vtexport.models.rope import rope_frequencies, rope_tables
from vtexport.models.spec import ViewChoice
from vtexport.pruning import Geometry, PruningPlan, make_plan
from vtexport.pruning.decoder import DecoderState, drop
from vtexport.targets.tensorrt_llm.torch_model.description import Description
from vtexport.targets.tensorrt_llm.torch_model.packing import Packed, Row
from vtexport.targets.tensorrt_llm.torch_model.pruning import Rope
from vtexport.targets.tensorrt_llm.torch_model.report import Report
from vtexport.targets.tensorrt_llm.torch_model.stages import Images, Schedule

#: LLaVA-1.5-7B's
SEVEN_B = Geometry(tokens=576, layers=32)


def sparse(keep: float = 0.3, **options: object) -> PruningPlan:
    return make_plan("sparsevlm", SEVEN_B, keep=keep, options={"layers": "2,6,15", **options})


# --- lengths ------------------------------------------------------------------------------------------------------


def test_parts_are_the_runs_of_layers_between_stages() -> None:
    plan = sparse()
    schedule = Schedule(plan)
    assert schedule.parts == 4
    assert [schedule.part_of(layer) for layer in (0, 2, 3, 6, 7, 15, 16, 31)] == [0, 0, 1, 1, 2, 2, 3, 3]
    tokens = schedule.visual(Images((3,), (576,), 20))
    assert tokens == [plan.per_layer[layer] for layer in (0, 3, 7, 16)]
    assert tokens[0] == 576
    assert tokens == sorted(set(tokens), reverse=True)


@given(st.data())
def test_lengths_of_mixed_steps_follow_each_request(data: st.DataObject) -> None:
    """Against a plain account of every request by itself."""
    schedule = Schedule(sparse(data.draw(st.sampled_from([0.2, 0.5]))))
    contexts = data.draw(st.integers(0, 4))
    requests = data.draw(st.lists(st.integers(0, 20), min_size=max(1, contexts), max_size=7, unique=True))
    texts = {request: data.draw(st.integers(1, 50)) for request in requests}
    shown = {request: data.draw(st.booleans()) for request in requests}
    made = {request: 0 if row < contexts else data.draw(st.integers(1, 9)) for row, request in enumerate(requests)}
    for request in requests:
        if shown[request]:
            schedule.start(request, Images((0,), (576,), texts[request]))
    prompts = [texts[request] + 576 * shown[request] for request in requests]
    new = [length if row < contexts else 1 for row, length in enumerate(prompts)]
    cached = [0 if row < contexts else prompts[row] + made[request] - 1 for row, request in enumerate(requests)]
    entering = schedule.visual(Images((0,), (576,), 1))
    for part in range(schedule.parts):
        lengths = schedule.lengths(part, requests, contexts, new, prompts, cached)
        for row, request in enumerate(requests):
            held = texts[request] + entering[part] * shown[request]
            assert lengths.prompts[row] == held
            assert lengths.new[row] == (held if row < contexts else 1)
            assert lengths.cached[row] == (0 if row < contexts else held + made[request] - 1)


def test_requests_are_forgotten_and_may_come_again() -> None:
    schedule = Schedule(sparse())
    schedule.start(7, Images((0,), (576,), 4))
    assert schedule.dropped(7)[0] == 0 < schedule.dropped(7)[1] < schedule.dropped(7)[3]
    assert schedule.dropped(8) == [0, 0, 0, 0]
    schedule.forget(7)
    schedule.forget(7)
    assert schedule.dropped(7) == [0, 0, 0, 0]
    assert len(schedule) == 0


# --- packed rows --------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_stage_on_packed_rows_is_a_stage_on_each_row(data: st.DataObject) -> None:
    """Mixed steps: contexts with images among rows without, each cut as if it were alone."""
    plan = make_plan("fastv", Geometry(tokens=12, layers=4), keep=0.5, options={"layers": "1"})
    schedule, width = Schedule(plan), 4
    texts = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    images = [Images((data.draw(st.integers(0, text)),), (12,), text) for text in texts]
    plain = data.draw(st.lists(st.integers(1, 5), min_size=len(texts) + 1, max_size=len(texts) + 1))
    lengths, rows = [plain[0]], []
    for one, other in zip(images, plain[1:], strict=True):
        rows.append(Row(len(lengths), len(rows), one))
        lengths += [one.length, other]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    hidden = torch.randn(sum(lengths), width)
    scores = torch.randn(len(rows), 12)
    packed = Packed.of(rows, lengths, 12, False, hidden.device)
    counts = plan.methods.decoder.counts(plan.decoder_stages[1])  # type: ignore[union-attr]
    dropped = drop(plan, counts, packed.state(hidden), lambda: scores)
    after = [schedule.visual(row.images)[1] + row.images.text for row in rows]
    new_lengths = [after[[row.number for row in rows].index(n)] if n % 2 else lengths[n] for n in range(len(lengths))]
    packed_after, source = packed.after(dropped.sequence, new_lengths)
    result = torch.cat([hidden, dropped.sequence.hidden.flatten(0, 1)])[source]
    assert len(result) == sum(new_lengths)
    for number, (before, now) in enumerate(zip(hidden.split(lengths), result.split(new_lengths), strict=True)):
        if number % 2 == 0:
            assert torch.equal(before, now)
            continue
        row = next(row for row in rows if row.number == number)
        alone = Packed.of([replace(row, number=0)], [row.images.length], 12, False, hidden.device)
        state = DecoderState(before[None], alone.positions, alone.layout)
        expected = drop(plan, counts, state, lambda row=row: scores[row.request][None]).sequence
        assert torch.equal(now, expected.hidden[0])
    # The rows that go on are again the contexts'.
    again = packed_after.batch(result)
    for number, row in enumerate(rows):
        length = new_lengths[row.number]
        assert torch.equal(again[number, :length], result.split(new_lengths)[row.number])


# --- what a bundle says of itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "method", "options"),
    [
        ("micro", "sparsevlm", {"layers": "2,5"}),
        ("llava_next-llama3", "fastervlm+pyramiddrop", {}),
        ("llava_onevision", "fastv", {}),
        ("video_llava", "visionzip", {}),
    ],
)
def test_a_description_is_read_as_it_was_written(
    case: str, method: str, options: dict[str, object], tmp_path: Path
) -> None:
    folder = MICRO if case == "micro" else family_checkpoint(tmp_path / "model", case)
    choice = ViewChoice(grid="2x2", arrangement="views") if case.startswith("llava_") else ViewChoice()
    spec = read_spec(folder, choice)
    plans = [make_plan(method, Geometry.of(spec), keep=keep, options=options) for keep in (0.5, 0.4)]
    frequencies, scaling = rope_frequencies(spec)
    written = Description(spec, plans, "fp16", frequencies.tolist(), scaling)
    written.write(tmp_path)
    assert Description.read(tmp_path) == written
    like = torch.zeros(1)
    again = Rope(written.frequencies, written.attention_scaling).tables(spec.decoder.max_positions, like)
    for mine, theirs in zip(again, rope_tables(spec), strict=True):
        assert torch.equal(mine, theirs)


def test_a_damaged_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is missing or damaged"):
        Description.read(tmp_path)
    file = tmp_path / "vtexport_llava/bundle.json"
    file.parent.mkdir()
    for text in ("{", "[]", '{"schema": 1}'):
        file.write_text(text)
        with pytest.raises(BundleError, match="is missing or damaged"):
            Description.read(tmp_path)
    file.write_text('{"schema": 9}')
    with pytest.raises(BundleError, match="has schema 9, not 1; install the vtexport that made it"):
        Description.read(tmp_path)


# --- what reached the decoder --------------------------------------------------------------------------------------


def test_reports_are_lines_of_json_and_a_dense_run_is_an_error(tmp_path: Path) -> None:
    schedule, images = Schedule(sparse()), Images((5,), (576,), 20)
    report = Report(schedule, tmp_path / "report.jsonl")
    tokens = schedule.visual(images)
    report.add([Row(1, 42, images)], lambda part: [3, 20 + tokens[part]])
    report.add([], lambda part: [])
    (line,) = (tmp_path / "report.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "request": 42,
        "text": 20,
        "parts": [{"layer": layer, "visual_tokens": count} for layer, count in zip((0, 3, 7, 16), tokens, strict=True)],
    }
    with pytest.raises(VerificationError, match=r"\[576, 576, 576, 576\] visual tokens reached"):
        report.add([Row(0, 42, images)], lambda part: [596])
