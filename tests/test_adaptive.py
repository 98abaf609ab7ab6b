"""`--keep auto` in a bundle: every image gets what a bundle of the keep ratio chosen for it would give."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import MICRO
from tests.conftest import BuildBundle, check_refused, noise_images
from tests.graph.test_parity import QUESTIONS
from vtexport.builder.build import build
from vtexport.builder.options import BuildOptions
from vtexport.bundle.folder import Bundle
from vtexport.errors import InputError
from vtexport.measure.evaluate import evaluate
from vtexport.micro import heldout
from vtexport.models import Checkpoint, read_spec
from vtexport.models.names import fingerprint
from vtexport.pruning.adaptive import AdaptiveTable, Policy
from vtexport.pruning.calibration import Calibration
from vtexport.runtime.runner import Runner
from vtexport.targets.engine import VisionInput
from vtexport.targets.tensorrt_llm import prompts

METHODS = ("sparsevlm", "fastervlm", "fastervlm+sparsevlm")
KEEPS = (0.5, 0.25)
EXAMPLES = list(heldout.examples(8))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """micro-llava's own, with a table by which images of spread up to 9.5 patches get a quarter of the tokens."""
    own = Calibration.load(MICRO / "calibration.toml")
    path = tmp_path_factory.mktemp("ranks") / "ranks.toml"
    replace(own, adaptive=(AdaptiveTable("sparsevlm", KEEPS, (9.5, 20.0), ((1.0, 1.0), (1.0, 0.0))),)).save(path)
    return path


@pytest.fixture(scope="module")
def tiny_calibration(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for the tiny checkpoint, with a table for every method."""
    spec, path = read_spec(tiny_checkpoint), tmp_path_factory.mktemp("ranks") / "ranks.toml"
    number = spec.decoder.num_layers
    Calibration(
        model=fingerprint(Checkpoint.open(tiny_checkpoint)),
        num_visual_tokens=spec.num_visual_tokens,
        pairs=1,
        ranks=(3.0,) * number,
        rank_spread=(0.0,) * number,
        mass=(0.5,) * number,
        keeps=(0.5,),
        layers=((0,),),
        agreement=(1.0,),
        exit_layer=1,
        exit_tolerance=0.0,
        adaptive=tuple(AdaptiveTable(m, (0.7, 0.5), (9.0, 30.0), ((1.0, 1.0), (1.0, 0.0))) for m in METHODS),
    ).save(path)
    return path


@pytest.fixture(scope="module")
def adaptive_bundle(calibration: Path, build_bundle: BuildBundle) -> Path:
    return build_bundle(keep="auto", method="sparsevlm", buckets=KEEPS, calibration=calibration)


@pytest.mark.parametrize("method", METHODS)
def test_each_image_gets_what_a_bundle_of_its_keep_ratio_gives(
    method: str, tiny_checkpoint: Path, tiny_calibration: Path, build_bundle: BuildBundle
) -> None:
    build = partial(build_bundle, tiny_checkpoint, method=method)
    runner = Runner.open(build(keep="auto", buckets=(0.7, 0.5), calibration=tiny_calibration))
    pairs = [(image, question) for image in noise_images(3) for question in QUESTIONS[:2]]
    # A limit between the images, so that both plans are chosen.
    pixels = np.concatenate([runner.prompter.views(image).pixels for image, _ in pairs])
    spreads = runner.engine.vision(VisionInput(pixels)).spread
    runner.policy = Policy((float(np.median(spreads)),), 1.0, 1.0)
    answers = runner.ask(pairs, 8)
    own = {} if method == "fastervlm" else {"calibration": tiny_calibration}
    fixed = {keep: Runner.open(build(keep=keep, **own)).ask(pairs, 8) for keep in (0.7, 0.5)}
    assert {answer.keep for answer in answers} == {0.7, 0.5}
    if method == "fastervlm":
        counts = [len(one["multi_modal_embeddings"]["image"][0]) for one in prompts(runner, pairs)]
        assert counts == [answer.visual_tokens["mean"] for answer in answers]
    for row, answer in enumerate(answers):
        assert answer.spread == pytest.approx(spreads[row], abs=1e-3)
        expected = fixed[answer.keep][row]
        assert answer.token_ids == expected.token_ids
        assert answer.stages == expected.stages
        assert answer.visual_tokens == expected.visual_tokens
        # And alone as in a batch.
        alone = runner.ask([pairs[row]], 8)[0]
        assert (alone.keep, alone.token_ids, alone.stages) == (answer.keep, answer.token_ids, answer.stages)


def test_the_buckets_share_a_graph_and_its_weights(
    adaptive_bundle: Path, calibration: Path, build_bundle: BuildBundle
) -> None:
    bundle = Bundle.open(adaptive_bundle)
    assert set(bundle.manifest.target.graphs) == {"vision", "language"}
    assert bundle.manifest.verification is not None
    assert bundle.manifest.verification.same_kept
    assert bundle.manifest.verification.same_tokens
    one = Bundle.open(build_bundle(MICRO, 0.25, "sparsevlm", calibration=calibration))
    assert bundle.size() < one.size() + 1_000_000


def test_eval_counts_what_was_chosen(adaptive_bundle: Path) -> None:
    score = evaluate(Runner.open(adaptive_bundle), 32)
    assert sum(score.by_keep.values()) == 32
    assert all(score.by_keep.values())
    plans = Bundle.open(adaptive_bundle).manifest.pruning_plans()
    tokens = sum(plan.mean_visual_tokens * score.by_keep[plan.keep] for plan in plans)
    assert score.mean_visual_tokens == pytest.approx(tokens / 32)


def test_commands_speak_of_the_chosen_bucket(
    vtexport,
    adaptive_bundle: Path,
    micro_bundle: Path,
    photo: Path,
    tmp_path: Path,
) -> None:
    ask = ("--image", photo, "--prompt", "what digit is red?")
    answer = json.loads(vtexport("run", adaptive_bundle, *ask, "--json").out)
    assert answer["keep"] in KEEPS
    assert answer["spread"] > 1
    plain = vtexport("run", adaptive_bundle, *ask)
    assert plain.out.strip() == answer["text"]
    assert f"keep {answer['keep']:g} chosen" in plain.err
    assert vtexport("show", adaptive_bundle, *ask, "-o", "kept.png").code == 0
    described = vtexport("inspect", adaptive_bundle).out
    assert "100.0% of answers as in the dense model at calibration" in described
    assert "spread up to 9.5 patches" in described
    assert "keep 0.25 for" in vtexport("eval", adaptive_bundle, "--limit", "16").out
    profiled = vtexport("profile", adaptive_bundle, "--bucket", "0.25", "--runs", "1", "--new-tokens", "2")
    assert "sparsevlm, keep 0.25" in profiled.out
    unasked = vtexport("profile", adaptive_bundle, "--runs", "1", "--new-tokens", "2", "--json", "profile.json")
    assert unasked.code == 0
    assert json.loads((tmp_path / "profile.json").read_text())["this"]["keep"] in KEEPS
    for bundle, message in ((micro_bundle, "--bucket has no effect"), (adaptive_bundle, "--bucket 0.3 is none of")):
        refused = vtexport("profile", bundle, "--bucket", "0.3")
        assert message in refused.err
        assert refused.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "automatic"], "--keep 'automatic' cannot be read; give a number or auto"),
        (["--keep", "0.5", "--buckets", "0.5,0.25"], "--buckets has no effect without --keep auto"),
        (["--keep", "0.5", "--target-accuracy", "0.9"], "--target-accuracy has no effect without --keep auto"),
        (["--keep", "auto", "--buckets", "0.5"], "leaves nothing to choose from"),
        (["--keep", "auto", "--buckets", "0.5,0.2"], "at keep 0.2, which no calibration of this model says"),
        (["--keep", "auto", "--method", "fastv"], "run vtexport calibrate --method fastv --buckets 0.5,0.25,0.125"),
        (["--keep", "auto", "--layers", "1"], "--layers cannot go with --keep auto"),
        (["--keep", "auto", "--method", "sgl"], "--keep auto cannot go with method sgl"),
        (["--keep", "auto", "--target-accuracy", "2"], "--target-accuracy 2 is out of range"),
        (["--keep", "auto", "--buckets", "0.17,0.125", "--target-accuracy", "1"], "is out of reach: at keep 0.17"),
    ],
)
def test_bad_options(vtexport, arguments: list[str], message: str, tmp_path: Path) -> None:
    outcome = vtexport("build", "--model", "micro-llava", "--out", "out", *arguments)
    check_refused(outcome, message, tmp_path)


def test_calibrate_measures_methods(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from vtexport.measure.calibrate import Pair, Trials, calibrate_model

    pairs, images = [], [Image.fromarray(example.image) for example in EXAMPLES]
    for number, (image, example) in enumerate(zip(images, EXAMPLES, strict=True)):
        image.save(tmp_path / f"{number}.png")
        pairs.append(Pair((tmp_path / f"{number}.png",), example.question.text))
    found = calibrate_model(str(tiny_checkpoint), pairs, Trials(("fastervlm", "sparsevlm"), (0.5, 0.4)))
    assert [table.method for table in found.adaptive] == ["fastervlm", "sparsevlm"]
    for table in found.adaptive:
        assert table.keeps == (0.5, 0.4)
        assert list(table.spread) == sorted(table.spread)
        assert all(share in (0, 1) for row in table.agreement for share in row)  # eight bins of one pair each
    # What was measured is what the engine does: build on it, and compare with the dense bundle's answers.
    found.save(tmp_path / "ranks.toml")
    spec = read_spec(tiny_checkpoint)
    found.check(
        tmp_path / "ranks.toml",
        fingerprint(Checkpoint.open(tiny_checkpoint)),
        spec.num_visual_tokens,
        spec.decoder.num_layers,
    )
    dense, half = (
        Runner(build(BuildOptions(str(tiny_checkpoint), keep, method, self_check=False), tmp_path / method))
        for keep, method in ((1.0, "dense"), (0.5, "fastervlm"))
    )
    same = [
        dense.ask([(image, pair.prompt)], 8)[0].token_ids == half.ask([(image, pair.prompt)], 8)[0].token_ids
        for image, pair in zip(images, pairs, strict=True)
    ]
    assert sum(same) == sum(found.adaptive[0].agreement[0])


def test_what_calibrate_refuses(vtexport, tiny_checkpoint: Path, tmp_path: Path) -> None:
    Image.fromarray(EXAMPLES[0].image).save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.png", "prompt": "what digit is red?"}\n')
    left = ["a.png", "pairs.jsonl"]
    base = ("calibrate", "--model", tiny_checkpoint, "--data", "pairs.jsonl", "-o", "ranks.toml")
    for more, message in {
        ("--buckets", "0.5,0.25"): "--buckets has no effect without --method",
        ("--method", "dense"): "--method dense has nothing to calibrate",
        ("--method", "fastervlm+sgl"): "has nothing to calibrate",
        ("--method", "best"): "unknown method 'best'",
    }.items():
        check_refused(vtexport(*base, *more), message, tmp_path, left)


def test_an_unknown_word_as_keep_is_refused_in_python_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--keep 'most' cannot be read; give a number or auto"):
        build(BuildOptions(str(MICRO), "most"), tmp_path / "out")


def test_an_image_that_is_remembered_gets_the_same_plan(adaptive_bundle: Path) -> None:
    """The spread that chooses is kept with the tower's output."""
    runner, plain = Runner.open(adaptive_bundle), Runner.open(adaptive_bundle, vision_cache=0)
    pairs = [(image, QUESTIONS[0]) for image in noise_images(3)]
    for _ in range(2):
        for mine, wanted in zip(runner.ask(pairs, 4), plain.ask(pairs, 4), strict=True):
            assert (mine.token_ids, mine.keep, mine.spread) == (wanted.token_ids, wanted.keep, wanted.spread)
