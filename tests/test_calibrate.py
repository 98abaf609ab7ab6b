"""`vtexport calibrate`: batches against one pair at a time, going on after a stop, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import MICRO
from tests.reference import calibration as plain
from tests.test_cli import check_refused
from vtexport.check.reference import ReferenceModel
from vtexport.errors import InputError
from vtexport.measure.calibrate import Pair, Trials, calibrate_model, read_pairs
from vtexport.measure.calibration import passes
from vtexport.measure.calibration.batches import ANSWER_TOKENS, Batch, batch_size
from vtexport.measure.calibration.partial import Partial, partial_file
from vtexport.micro.pairs import write_pairs
from vtexport.models import read_spec
from vtexport.models.prompt import Prompter
from vtexport.pruning.calibration import RANK_TOLERANCE


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Four pairs, whose prompts have several lengths."""
    return read_pairs(write_pairs(tmp_path_factory.mktemp("pairs"), 4))


@pytest.fixture(scope="module")
def subjects(pairs: list[Pair]) -> tuple[ReferenceModel, passes.Subjects]:
    spec = read_spec(MICRO)
    return ReferenceModel(MICRO, spec), passes.Subjects.of(pairs, Prompter(MICRO, spec))


def test_a_batch_measures_what_one_pair_at_a_time_does(subjects) -> None:
    model, several = subjects
    views = [several.prompter.views(several.prompter.open_pictures(pair.images)) for pair in several.pairs]
    assert len({len(prompt.token_ids) for prompt in several.prompts}) > 1
    single = [plain.Pair(model, prompt, seen) for prompt, seen in zip(several.prompts, views, strict=True)]
    plan, batch = single[0].plan, Batch(model, single[0].dense, several.prompts, views)
    exits = {number: plan("exit", keep=None, options={"layers": str(number)}) for number in range(11)}
    measured = batch.measure(exits, answers=True)
    for pair, found in zip(single, measured, strict=True):
        assert found.token == pair.token
        assert found.answer == pair.answer(ANSWER_TOKENS)
        assert found.changed == [*(pair.changed(number) for number in range(11)), False]
        attention = pair.attention()
        np.testing.assert_allclose(found.mass, [rows.sum(axis=1).mean() for rows in attention], rtol=1e-4)
        for rank, rows in zip(found.ranks, attention, strict=True):
            values = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
            assert rank == (values >= RANK_TOLERANCE * values[0]).sum()
        spread = model.vision(pair.views, pair.dense).spread
        assert abs(found.spread - spread) < 1e-3
    tried = [
        plan("sparsevlm", keep=0.5, options={"layers": "2"}),
        plan("sparsevlm", keep=0.25, options={"layers": "0,3,7"}),
        plan("fastervlm", keep=0.1),
        plan("fastervlm+sparsevlm", keep=0.25),
        plan("dense", keep=1.0),
        plan("exit", keep=None, options={"layers": "3"}),
        plan("fastv", keep=0.3),
    ]
    answers = [values.answer for values in measured]
    logits = dict(batch.logits(tried, [answer[:-1] for answer in answers], np.copy))
    assert sorted(logits) == list(range(len(tried)))
    for number, of_plan in enumerate(tried):
        for row, pair in enumerate(single):
            wanted = pair.logits(of_plan, answers[row][:-1])
            np.testing.assert_allclose(logits[number][row, : len(wanted)], wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.long
def test_batches_of_other_sizes_measure_the_same(pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(("fastervlm", "sparsevlm"), (0.5, 0.25))
    whole = calibrate_model(str(MICRO), pairs[:3], trials)
    monkeypatch.setattr(passes, "batch_size", lambda *_: 2)
    assert calibrate_model(str(MICRO), pairs[:3], trials) == whole


def test_memory_of_a_batch_is_bounded() -> None:
    spec = read_spec(MICRO)
    assert batch_size(spec, 20) == 16
    assert batch_size(spec, 2000) < batch_size(spec, 200) <= 16
    assert batch_size(spec, 10**6) == 1


class Stopping:
    """A progress that stops the work after some pairs, as a kill does, and keeps what it is told."""

    def __init__(self, after: int = 10**9) -> None:
        self.after, self.stages, self.warnings = after, list[tuple[str, int | None]](), list[str]()

    def stage(self, text: str, total: int | None = None) -> None:
        self.stages.append((text, total))

    def advance(self, steps: int = 1) -> None:
        self.after -= steps
        if self.after <= 0:
            raise KeyboardInterrupt

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that ran, two pairs at most."""
    sizes: list[int] = []

    class Counted(Batch):
        def __init__(self, model, dense, prompts, views) -> None:
            sizes.append(len(prompts))
            super().__init__(model, dense, prompts, views)

    monkeypatch.setattr(passes, "batch_size", lambda *_: 2)
    monkeypatch.setattr(passes, "Batch", Counted)
    return sizes


def test_it_goes_on_where_it_was_stopped(
    pairs: list[Pair], counted: list[int], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def run(partial: Path | None, progress: Stopping, trials: Trials | None = None, some: int = 3):
        counted.clear()
        return calibrate_model(str(tiny_checkpoint), pairs[:some], trials, progress, partial=partial)

    whole, kept = run(None, Stopping()), partial_file(tmp_path / "ranks.toml")
    assert counted == [2, 1] * 2
    assert kept.name == ".ranks.toml.partial"
    with pytest.raises(KeyboardInterrupt):
        run(kept, Stopping(after=4))
    assert counted == [2, 1, 2]
    with kept.open("ab") as file:  # the last line of a process that was killed while it wrote
        file.write(kept.read_bytes()[:-20])
    assert run(kept, progress := Stopping()) == whole
    assert counted == [1]
    assert not progress.warnings
    assert run(kept, Stopping()) == whole
    assert counted == []
    # Another tolerance or more pairs use what still holds; other images and damaged lines do not.
    run(kept, Stopping(), Trials(exit_tolerance=0.5))
    assert counted == []
    run(kept, progress := Stopping(), some=4)
    assert counted[0] == 2
    assert len(counted) < 4
    assert not progress.warnings
    for damage in (b"", b"\xff\x00[[[\n" + b"[" * 10**5 + b'\n{"key": "x", "results": []}\n' + kept.read_bytes()[:40]):
        kept.write_bytes(damage)
        assert run(kept, progress := Stopping()) == whole
        assert counted == [2, 1] * 2
        assert [".ranks.toml.partial held nothing" in text for text in progress.warnings] == [True] * bool(damage)
    assert run(kept, Stopping()) == whole
    assert counted == []
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    for results in ([{}], lines[0]["results"][:1], lines[-1]["results"]):
        kept.write_text(json.dumps({**lines[0], "results": results}) + "\n" + json.dumps(lines[1]) + "\n")
        assert run(kept, Stopping()) == whole


def test_what_cannot_be_a_partial_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"not a regular file, and results are kept there .*; remove it"):
        Partial(tmp_path / "folder")


def test_the_command_leaves_no_partial_file(vtexport, tiny_checkpoint: Path, pairs: list[Pair], tmp_path: Path) -> None:
    lines = [json.dumps({"image": str(pair.images[0]), "prompt": pair.prompt}) for pair in pairs[:2]]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    (tmp_path / ".ranks.toml.partial").write_text("damaged")
    done = vtexport("calibrate", "--model", tiny_checkpoint, "--data", "pairs.jsonl", "-o", "ranks.toml")
    assert done.code == 0, done.err
    assert "warning: " in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "ranks.toml"]


@pytest.mark.parametrize(
    ("tensor", "where"),
    [
        ("layers.1.mlp.down_proj.weight", "decoder layer 1 gives NaN or infinity"),
        ("layers.2.self_attn.q_proj.weight", "decoder layer 2 gives NaN or infinity"),
        ("lm_head.weight", "the head gives NaN or infinity"),
        ("multi_modal_projector.linear_2.bias", "the vision tower or the projector gives NaN or infinity"),
    ],
)
def test_no_number_comes_of_a_model_that_computes_none(
    tensor: str, where: str, vtexport, tiny_checkpoint: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    (name,) = [name for name in weights if name.endswith(tensor) and "vision_tower" not in name]
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, tmp_path / "tiny" / "model.safetensors", {"format": "pt"})
    line = {"image": str(pairs[0].images[0]), "prompt": pairs[0].prompt}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    outcome = vtexport("calibrate", "--model", "tiny", "--data", "pairs.jsonl", "-o", "ranks.toml")
    check_refused(outcome, where, tmp_path, ["pairs.jsonl", "tiny"])


def test_a_later_image_that_is_none_is_refused_before_the_work(pairs: list[Pair], tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no image")
    bad = [*pairs, Pair((tmp_path / "no.png",), "what?")]
    with pytest.raises(InputError, match="not a readable image"):
        calibrate_model(str(MICRO), bad, progress=Stopping(after=1), partial=tmp_path / "partial")
    assert not (tmp_path / "partial").exists()
