"""vtexport eval: questions of a user's own, metrics, and whether two bundles differ."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

from tests.checkpoints import MICRO
from tests.conftest import BuildBundle, check_refused
from vtexport.builder.build import build_random_twin, check_twin
from vtexport.bundle.folder import Bundle
from vtexport.errors import InputError, StorageError
from vtexport.measure import evaluate as evaluation
from vtexport.measure.evaluate import check_items, evaluate
from vtexport.measure.questions import Item, heldout_items, read_items
from vtexport.measure.scoring import METRICS, choice, exact, option, plain, vqa, vqa_plain
from vtexport.measure.significance import compare, interval, mcnemar, sign_flips
from vtexport.micro import heldout
from vtexport.runtime.runner import Runner
from vtexport.writing import check_file, write_whole

RIGHT = {"image": "photo.png", "prompt": "what digit is red?", "answer": "7"}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes lines, objects or text as they are, into a file of questions beside an image."""
    Image.fromarray(next(heldout.examples()).image).save(tmp_path / "photo.png")

    def lines(*entries: object, name: str = "questions.jsonl") -> Path:
        texts = [entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in entries]
        (tmp_path / name).write_text("\n".join(texts), encoding="utf-8")
        return tmp_path / name

    return lines


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 24 held-out questions as a user's own file."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "images").mkdir()
    lines = []
    for number, example in enumerate(heldout.examples(24)):
        name = f"images/{number // 4}.png"
        Image.fromarray(example.image).save(folder / name)
        asked = example.question
        lines.append({"id": f"q{number}", "image": name, "prompt": asked.text, "answers": [asked.answer]})
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "all.jsonl"


# Metrics


@pytest.mark.parametrize(
    ("text", "compared"),
    [
        ("A Cat.", "a cat"),
        ("  top \n left ", "top left"),
        ("3.5", "3.5"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
    ],
)
def test_exact_match_overlooks_case_space_and_the_final_period(text: str, compared: str) -> None:
    assert plain(text) == compared
    assert exact(text, ["nothing", compared]) == 1
    assert exact(text, ["nothing"]) == exact(text, [f"{compared}s"]) == 0


@pytest.mark.parametrize(
    ("text", "compared"),
    [
        ("The Dog.", "dog"),
        ("an apple and a pear", "apple and pear"),
        ("dont", "don't"),
        ("It isnt", "it isn't"),
        ("its hers", "its hers"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("3.5 m.", "3.5 m"),
        ("U.S.A.", "usa"),
        ("two", "2"),
        ("none", "0"),
        ("twenty two", "twenty 2"),
        ("yes/no\n(maybe)", "yes no maybe"),
        ("t-shirt", "t shirt"),
        ("the", ""),
    ],
)
def test_vqa_answers_are_compared_by_the_published_rules(text: str, compared: str) -> None:
    assert vqa_plain(text) == compared
    assert vqa_plain(vqa_plain(text)) == compared


@given(
    st.lists(st.sampled_from(["red", "blue", "The red.", "Red"]), min_size=4, max_size=12),
    st.sampled_from(["red", "blue"]),
)
def test_vqa_accuracy_is_the_mean_over_all_humans_but_one(right: list[str], answer: str) -> None:
    marks = [
        min(Fraction(1), Fraction(sum(vqa_plain(one) == answer for one in others), 3))
        for others in combinations(right, len(right) - 1)
    ]
    assert vqa(answer, right) == pytest.approx(float(sum(marks) / len(marks)))


def test_vqa_accuracy_of_ten_humans() -> None:
    """The values that the official evaluation gives for 0 to 4 of 10 humans who agree."""
    for agreeing, accuracy in enumerate([0, 0.3, 0.6, 0.9, 1]):
        assert vqa("cat", ["cat"] * agreeing + ["dog"] * (10 - agreeing)) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(b)", "B"), ("b) a cat", "B"), ("B. a cat", "B"), ("B a cat", "B"), (" c.", "C"),
        ("The answer is D", "D"), ("The answer is (D), not E.", "D"), ("it's C", "C"), ("It's C", "C"), ("e.g. C", "C"),
        ("a cat", None), ("cat", None), ("", None), ("7", None), ("ABC", None), ("the USA", None), ("Ä", None),
    ],
)  # fmt: skip
def test_the_first_option_letter_counts(text: str, letter: str | None) -> None:
    assert option(text) == letter
    assert choice(text, ["B", "C", "D"]) == (letter is not None)
    assert choice(text, ["E"]) == 0


# Significance


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [(0, 0, 1), (1, 0, 1), (3, 3, 1), (10, 0, 2 / 1024), (5, 15, 43400 / 2**20), (6, 1, 16 / 128)],
)
def test_mcnemar_by_hand(better: int, worse: int, p: float) -> None:
    assert mcnemar(better, worse) == pytest.approx(p, rel=1e-12)


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_binomial_test(better: int, worse: int) -> None:
    expected = binomtest(better, better + worse).pvalue if better + worse else 1
    assert mcnemar(better, worse) == mcnemar(worse, better) == pytest.approx(expected, rel=1e-9)
    assert 0 < mcnemar(better, worse) <= 1


def test_mcnemar_with_many_questions() -> None:
    assert mcnemar(50_000, 50_600) == pytest.approx(binomtest(50_000, 100_600).pvalue, rel=1e-6)
    assert mcnemar(0, 5_000) == 0


def flipped(differences: Sequence[float]) -> float:
    """The p value of the permutation test by all signs."""
    sums = [abs(sum(sign * one for sign, one in zip(signs, differences, strict=True)))
            for signs in product((-1, 1), repeat=len(differences))]  # fmt: skip
    return sum(one >= abs(sum(differences)) - 1e-9 for one in sums) / len(sums)


@given(st.lists(st.integers(-30, 30).map(lambda n: n / 30), min_size=1, max_size=9))
def test_sign_flips_are_those_of_all_signs(differences: list[float]) -> None:
    # Six standard errors of 100,000 draws.
    assert sign_flips(differences) == pytest.approx(flipped(differences), abs=0.01)
    assert sign_flips(differences) == sign_flips([-one for one in differences])


def test_sign_flips_of_whole_points_are_mcnemar() -> None:
    differences = [1.0] * 20 + [-1.0] * 9 + [0.0] * 500
    assert sign_flips(differences) == pytest.approx(mcnemar(20, 9), abs=0.004)
    assert sign_flips([0.0] * 5) == 1


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60))
def test_the_interval_holds_the_difference_and_turns_with_it(differences: list[float]) -> None:
    low, high = interval(differences)
    assert -1 <= low <= sum(differences) / len(differences) <= high <= 1
    assert interval([-one for one in differences]) == pytest.approx((-high, -low))
    wider = interval(differences * 4)
    assert wider[1] - wider[0] <= high - low + 1e-12


def test_the_interval_is_agresti_and_mins() -> None:
    both, better, worse, neither = 40, 12, 5, 43
    # Half an observation in each cell, and then Wald's interval of two paired shares.
    b, c, n = better + 0.5, worse + 0.5, both + better + worse + neither + 2
    reach = 1.959964 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    low, high = interval([1.0] * better + [-1.0] * worse + [0.0] * (both + neither))
    assert (low, high) == pytest.approx(((b - c) / n - reach, (b - c) / n + reach))


def test_comparing_counts_what_only_one_got_right() -> None:
    found = compare([1, 1, 1, 0, 0], [1, 0, 0, 1, 0], graded=False)
    assert (found.better, found.worse) == (2, 1)
    assert found.difference == pytest.approx(0.2)
    assert found.p == mcnemar(2, 1)
    assert "McNemar" in found.test
    assert "seed" in compare([0.3], [0.6], graded=True).test
    for scores in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match="cannot be paired"):
            compare(scores, [1.0][: len(scores)], graded=False)


# Reading questions


def test_questions_are_read_as_they_stand(write: Write, tmp_path: Path) -> None:
    path = write(
        "\ufeff" + json.dumps(RIGHT) + "\r",
        " ",
        {**RIGHT, "prompt": "what\u2028is it?", "answer": "Ä cat", "id": 7},
        {"image": [str(tmp_path / "photo.png"), "photo.png"], "prompt": "which?", "answers": ["a", "b"], "id": "two"},
    )
    read = read_items(path, METRICS["exact"])
    assert [item.id for item in read] == [1, 7, "two"]
    assert read[1].prompt == "what\u2028is it?"
    assert read[1].answers == ("Ä cat",)
    assert read[2].images == (tmp_path / "photo.png", tmp_path / "photo.png")
    assert [item.id for item in read_items(path, METRICS["exact"], 2)] == [1, 7]


def test_every_line_is_checked_before_the_engine_is_opened(
    vtexport, write: Write, micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "open", lambda *_, **__: pytest.fail("the engine was opened"))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(RIGHT).encode() + b'\n{"prompt": "\xe4"}')
    nested = '{"image": "photo.png", "prompt": "what?", "extra": ' + 100_000 * "[" + 100_000 * "]" + "}"
    left = ["latin.jsonl", "photo.png", "questions.jsonl", "text.png"]

    def refused(message: str, *lines: object, flags: Sequence[object] = ()) -> None:
        path = write(*lines) if lines else tmp_path / "latin.jsonl"
        outcome = vtexport("eval", micro_bundle, "--data", path, "--output", "answers.jsonl", *flags)
        check_refused(outcome, message, tmp_path, left)

    write(RIGHT)
    refused("latin.jsonl, line 2: it is not UTF-8 (byte 13 of the line)")
    for message, wrong in (
        ("line 2: Object contains unknown field `answr`", {"image": "photo.png", "prompt": "what?", "answr": "7"}),
        ("line 2: Object contains unknown field `extra`", nested),
        ("line 2: Expected `object`, got `array`", 100_000 * "["),
        ("line 2: JSON is malformed", "what?"),
        ("line 2: Input data was truncated", '{"image": "photo.png"'),
        ("line 2: Expected `str`, got `int` - at `$.prompt`", {**RIGHT, "prompt": 7}),
        ("line 2: Expected `str | array`, got `null` - at `$.image`", {**RIGHT, "image": None}),
        ("line 2: Expected `str`, got `int` - at `$.answer`", {**RIGHT, "answer": 7}),
        ("line 2: Expected `int | str`, got `float` - at `$.id`", {**RIGHT, "id": 1.5}),
        ("line 2: Object missing required field `prompt`", {"image": "photo.png", "answer": "7"}),
        ("line 2: the prompt is empty", {**RIGHT, "prompt": " "}),
        ("line 2: it has no answers", {"image": "photo.png", "prompt": "what?"}),
        ("line 2: it has both answer and answers", {**RIGHT, "answers": ["7"]}),
        ("line 2: an answer is empty", {**RIGHT, "answer": ""}),
        ("line 2: the list of answers is empty", {"image": "photo.png", "prompt": "what?", "answers": []}),
        ("line 2: the list of images is empty", {**RIGHT, "image": []}),
        ("line 2: no such image", {**RIGHT, "image": "nowhere.png"}),
        ("line 2: 'text.png' is not a readable image", {**RIGHT, "image": "text.png"}),
        ("no such image", {**RIGHT, "image": "a\0b.png"}),
        ("no such image", {**RIGHT, "image": 5000 * "a"}),
        ("line 2: the id 1 is taken by", {**RIGHT, "id": 1}),
    ):
        refused(message, RIGHT, wrong)
    refused("questions.jsonl holds no question", "", "  ")
    refused("--limit 3 is out of range; give 1 to 2", RIGHT, RIGHT, flags=["--limit", 3])
    refused("--limit 0 is out of range; give 1 to 2", RIGHT, RIGHT, flags=["--limit", 0])
    refused("line 1: it has 1 answers, and VQA accuracy needs at least 4", RIGHT, flags=["--metric", "vqa"])
    refused("line 1: it has the answer '7', which is no option", RIGHT, flags=["--metric", "choice"])
    for path, message in (("nowhere.jsonl", "No such file"), (tmp_path, "Is a directory")):
        check_refused(vtexport("eval", micro_bundle, "--data", path), message, tmp_path, left)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["photo.png", "7"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
LINES = st.dictionaries(st.sampled_from(["image", "prompt", "answer", "answers", "id", "more"]), JSON).map(json.dumps)


@given(st.binary(max_size=60) | st.lists(LINES, max_size=3).map(lambda lines: "\n".join(lines).encode()))
def test_whatever_the_file_holds_it_is_questions_or_an_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "questions.jsonl"
        path.write_bytes(data)
        Image.new("RGB", (4, 4)).save(path.parent / "photo.png")
        said, items = "", list[Item]()
        try:
            items = read_items(path, METRICS["exact"])
        except InputError as error:
            said = str(error)
        assert all(item.prompt.strip() and item.answers and item.images for item in items)
        assert bool(items) != bool(said)
        assert not said or (said.startswith(str(path)) and len(said.splitlines()) == 1)


def test_flags_without_effect_and_bad_outputs_are_refused(
    vtexport, write: Write, micro_bundle: Path, tmp_path: Path
) -> None:
    path, left = write(RIGHT), ["photo.png", "questions.jsonl"]
    data = ["--data", path]
    for arguments, message in (
        (["--metric", "exact"], "--metric has no effect without --data"),
        ([*data, "--metric", "bleu"], "'bleu' is not one of 'exact', 'vqa', 'choice'"),
        ([*data, "--batch", 0], "0 is not in the range"),
        ([*data, "--max-new-tokens", 0], "0 is not in the range"),
        ([*data, "--ranking-from", micro_bundle], "--ranking-from has no effect with method fastervlm"),
        ([*data, "--output", "nowhere/answers.jsonl"], "is not a folder; give another --output"),
        ([*data, "--output", tmp_path], "is a folder; give another --output"),
        ([*data, "--output", tmp_path / ".." / tmp_path.name / path.name], "is an input"),
        ([*data, "--against", "nowhere"], "nowhere is not a folder"),
        ([*data, "--against", "dense", "--against", "dense"], "--against dense is given twice"),
    ):
        check_refused(vtexport("eval", micro_bundle, *arguments), message, tmp_path, left)
    assert path.read_text() == json.dumps(RIGHT)


def test_questions_that_a_bundle_cannot_take_are_refused_before_any_is_asked(
    vtexport, write: Write, micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "ask", lambda *_, **__: pytest.fail("a question was asked"))
    (tmp_path / "frames").mkdir()
    left = ["frames", "photo.png", "questions.jsonl"]
    for message, wrong in (
        ("line 2: it has 2 images, but", {**RIGHT, "image": ["photo.png", "photo.png"]}),
        ("frames is a folder, but", {**RIGHT, "image": "frames"}),
        ("line 2: the prompt has 2 <image> marks", {**RIGHT, "prompt": "<image> or <image>?"}),
        ("exceed the model's positions", {**RIGHT, "prompt": 3000 * "what "}),
    ):
        outcome = vtexport("eval", micro_bundle, "--data", write(RIGHT, wrong))
        assert outcome.code == 2
        assert message in outcome.err.splitlines()[-1]
        assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_an_image_that_breaks_off_leaves_no_output(vtexport, write: Write, micro_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes((tmp_path / "photo.png").read_bytes()[:3000])
    (tmp_path / "answers.jsonl").write_text("before")
    path = write(RIGHT, {**RIGHT, "image": "half.png"})
    outcome = vtexport("eval", micro_bundle, "--data", path, "--output", "answers.jsonl")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith(f"error: {path}, line 2: ")
    assert "half.png: not a readable image" in outcome.err
    assert (tmp_path / "answers.jsonl").read_text() == "before"


# Files


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("before")
    write_whole(path, "ä\n")
    assert path.read_text(encoding="utf-8") == "ä\n"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StorageError, match="is not a folder"):
        check_file(path / "below", "--output")
    with pytest.raises(StorageError, match="give another --output"):
        check_file(Path("/proc/answers.jsonl"), "--output")
    with pytest.raises(StorageError, match="give another --output"):
        write_whole(Path("/proc/answers.jsonl"), "", "--output")


# Answering


def test_own_questions_score_as_the_held_out_ones_do(
    vtexport, questions: Path, micro_bundle: Path, tmp_path: Path
) -> None:
    outcome = vtexport("eval", micro_bundle, "--data", questions, "--batch", 5, "--json", "--output", "answers.jsonl")
    assert outcome.code == 0, outcome.err
    for stage in ("read questions", "check questions", "ask"):
        assert stage in outcome.err
    score = json.loads(outcome.out)
    assert score["accuracy"] == pytest.approx(evaluate(Runner.open(micro_bundle), 24).accuracy)
    assert (score["questions"], score["metric"], score["batch"], score["max_new_tokens"]) == (24, "exact", 5, 16)
    assert score["by_kind"] == {}
    assert score["by_keep"] == {"0.25": 24}
    assert score["mean_visual_tokens"] == 36
    assert 0 < score["per_token_ms"] < score["first_token_ms"]
    assert "against" not in score
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"q{number}" for number in range(24)]
    assert set(lines[0]) == {"id", "prompt", "answers", "answer", "score"}
    assert np.mean([line["score"] for line in lines]) == pytest.approx(score["accuracy"])
    assert all(line["score"] == exact(line["answer"], line["answers"]) for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl"}


def test_the_table_says_how_fast_answers_came(vtexport, questions: Path, micro_bundle: Path) -> None:
    said = vtexport("eval", micro_bundle, "--data", questions, "--limit", 3, "--max-new-tokens", 1).out
    assert "36 visual tokens" in said
    assert "ms to the first token" in said
    assert "ms per token" not in said  # a single token takes no decode step
    assert "3 questions, batch 1, at most 1 new tokens" in said


def test_held_out_answers_match_as_they_stand(micro_runner: Runner) -> None:
    """Exact match overlooks case and final periods, which no held-out answer has."""
    score = evaluate(micro_runner, 200)
    assert all(reply.score == (reply.text == reply.item.answers[0]) for reply in score.replies)


def test_bundles_are_compared_on_the_same_questions(
    vtexport, questions: Path, micro_bundle: Path, build_bundle: BuildBundle, tmp_path: Path
) -> None:
    other = build_bundle(MICRO, 0.1, "random")
    sides = ["--against", other, "--against", "dense", "--against", "random"]
    outcome = vtexport("eval", micro_bundle, "--data", questions, *sides, "--json", "--output", "answers.jsonl")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["bundle"] == str(micro_bundle)
    assert [side["bundle"] for side in report["against"]] == [str(other), "dense", "random"]
    assert [side["method"] for side in report["against"]] == ["random", "dense", "random"]
    assert [side["mean_visual_tokens"] for side in report["against"]] == [14, 144, 36]
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for side in report["against"]:
        pairs = [(line["score"], line["against"][side["bundle"]]["score"]) for line in lines]
        found = side["comparison"]
        assert found["better"] == sum(this > that for this, that in pairs)
        assert found["worse"] == sum(this < that for this, that in pairs)
        assert found["difference"] == pytest.approx(report["accuracy"] - side["accuracy"])
        assert found["p"] == pytest.approx(mcnemar(found["better"], found["worse"]))
        assert found["low"] <= found["difference"] <= found["high"]
    assert report["against"][0]["accuracy"] < report["accuracy"]
    said = vtexport("eval", micro_bundle, "--data", questions, *sides[:2], "--metric", "exact", "--limit", 4).out
    for words in ("difference", "95% interval", "better on", "worse on", "McNemar, exact", "first token, ms", "points"):
        assert words in said


def test_graded_scores_are_compared_by_sign_flips(vtexport, write: Write, micro_bundle: Path) -> None:
    asked = next(heldout.examples()).question
    answers = [asked.answer, asked.answer.upper(), f"the {asked.answer}.", "another"]
    path = write({"image": "photo.png", "prompt": asked.text, "answers": answers})
    report = json.loads(
        vtexport("eval", micro_bundle, "--data", path, "--metric", "vqa", "--against", "dense", "--json").out
    )
    assert report["accuracy"] == pytest.approx((3 * 2 / 3 + 1) / 4)
    assert report["against"][0]["comparison"]["test"].startswith("sign flips")
    lettered = write({"image": "photo.png", "prompt": asked.text, "answer": "(b)"})
    chosen = json.loads(vtexport("eval", micro_bundle, "--data", lettered, "--metric", "choice", "--json").out)
    assert (chosen["accuracy"], chosen["metric"]) == (0, "choice")


def test_held_out_questions_compare_by_kind(vtexport, micro_bundle: Path) -> None:
    outcome = vtexport("eval", micro_bundle, "--limit", 16, "--against", "random", "--json")
    report = json.loads(outcome.out)
    assert set(report["by_kind"]) == set(report["against"][0]["by_kind"]) == {"digit", "colour", "where", "count"}
    assert report["batch"] == evaluation.BATCH
    assert {"digit", "count"} <= set(vtexport("eval", micro_bundle, "--limit", 4, "--against", "random").out.split())


def test_the_random_twin_has_the_budget(build_bundle: BuildBundle, tmp_path: Path) -> None:
    bundle = Bundle.open(build_bundle(MICRO, 0.25, "sparsevlm"))
    (plan,) = bundle.manifest.pruning_plans()
    twin = build_random_twin(bundle, plan.mean_visual_tokens / plan.num_visual_tokens, tmp_path / "random")
    (built,) = twin.manifest.pruning_plans()
    assert built.method == "random"
    assert abs(built.mean_visual_tokens - plan.mean_visual_tokens) <= 0.5
    pairs = [(Image.fromarray(example.image), example.question.text) for example in heldout.examples(4)]
    runners = [Runner(twin), Runner.open(build_bundle(MICRO, built.keep, "random"))]
    first, second = (runner.ask(pairs, 4) for runner in runners)
    assert [(one.token_ids, one.stages) for one in first] == [(one.token_ids, one.stages) for one in second]


def test_twins_that_would_be_the_same_are_refused(
    vtexport, build_bundle: BuildBundle, questions: Path, tmp_path: Path
) -> None:
    dense, drawn = build_bundle(MICRO, 1.0, "dense"), build_bundle(MICRO, 0.1, "random")
    for bundle, twin, itself in ((dense, "random", "dense"), (dense, "dense", "dense"), (drawn, "random", "random")):
        with pytest.raises(InputError, match=f"is {itself} itself"):
            check_twin(Bundle.open(bundle), twin)
        outcome = vtexport("eval", bundle, "--data", questions, "--against", twin)
        assert outcome.code == 2
        assert f"is {itself} itself" in outcome.err.splitlines()[-1]
        assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_waits_for_a_ranking(
    vtexport, build_bundle: BuildBundle, micro_bundle: Path, questions: Path
) -> None:
    ranker = build_bundle(MICRO, 1.0, "dense", give_ranking=True)
    waits = build_bundle(MICRO, 0.5, "sgl")
    ask = ("--data", questions, "--limit", 2)
    alone = vtexport("eval", waits, *ask)
    assert alone.code == 2
    assert "give that bundle as --ranking-from" in alone.err
    other = vtexport("eval", micro_bundle, *ask, "--against", waits)
    assert other.code == 2
    assert "waits for another bundle's ranking" in other.err
    done = vtexport("eval", waits, *ask, "--ranking-from", ranker, "--against", micro_bundle, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["method"] == "sgl"


def test_several_images_per_question(build_bundle: BuildBundle, tiny_checkpoint: Path, write: Write) -> None:
    from vtexport.models.spec import ViewChoice

    runner = Runner.open(build_bundle(tiny_checkpoint, 0.4, "fastervlm", views=ViewChoice(images=2), self_check=False))
    path = write({**RIGHT, "image": ["photo.png", "photo.png"], "prompt": "what differs?"})
    items = read_items(path, METRICS["exact"])
    check_items(runner, items, 2)
    score = evaluation.ask(runner, items, METRICS["exact"], 1, 2)
    assert score.total == 1
    with pytest.raises(InputError, match=r"line 1: it has 1 images, but .* takes 2 per prompt"):
        check_items(runner, read_items(write(RIGHT), METRICS["exact"]), 2)


def test_the_first_batch_does_not_count_for_times(micro_runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[Any]] = []
    ask = Runner.ask

    def slow_at_first(self: Runner, pairs: Sequence[Any], *more: Any) -> Any:
        asked.append(pairs)
        answers = ask(self, pairs, *more)
        for answer in answers:
            answer.timings_ms.update(
                preprocess=1.0, vision=1.0, prefill=1000.0 if len(asked) == 1 else 1.0, per_token=2.0
            )
        return answers

    monkeypatch.setattr(Runner, "ask", slow_at_first)
    items: list[Item] = heldout_items(5)
    score = evaluation.ask(micro_runner, items, METRICS["exact"], 2, 4)
    assert [len(pairs) for pairs in asked] == [2, 2, 1]
    assert (score.first_token, score.per_token) == (3, 2)
    asked.clear()
    assert evaluation.ask(micro_runner, items, METRICS["exact"], 5, 4).first_token == 1002


def test_random_beside_keep_auto_has_the_mean_budget(vtexport, build_bundle: BuildBundle) -> None:
    bundle = build_bundle("micro-llava", "auto", "sparsevlm", target_accuracy=0.95)
    report = json.loads(vtexport("eval", bundle, "--limit", 32, "--against", "random", "--json").out)
    (drawn,) = report["against"]
    assert sum(report["by_keep"].values()) == 32
    assert sum(count > 0 for count in report["by_keep"].values()) > 1
    assert len(drawn["by_keep"]) == 1
    assert drawn["mean_visual_tokens"] == pytest.approx(report["mean_visual_tokens"], abs=0.5)
    assert "of the questions" in vtexport("eval", bundle, "--limit", 4, "--against", "random").out
