"""The command line as a user meets it: what it prints, and one line and exit code 2 for bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import MICRO, random_checkpoint
from tests.conftest import check_refused
from vtexport.bundle.manifest import MANIFEST
from vtexport.cli import main as cli
from vtexport.micro import heldout
from vtexport.native import kernels as native
from vtexport.pruning.calibration import Calibration

README = Path(__file__).parents[1] / "README.md"


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from vtexport.cli import main as cli; sys.argv = ['vtexport', '--help']\n"
        "try: cli.main()\n"
        "finally: print([m for m in ('torch', 'transformers', 'onnxruntime', 'numpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "build" in done.stdout


def test_every_command_is_in_the_readme_with_an_example_in_its_help() -> None:
    readme = README.read_text(encoding="utf-8")
    for name, command in cli.cli.commands.items():
        assert f"vtexport {name}" in readme, name
        if name not in ("list", "doctor"):
            assert f"vtexport {name}" in (command.help or ""), name


def test_the_version_is_the_packages(vtexport) -> None:
    from importlib.metadata import version

    assert version("vtexport") in vtexport("--version").out


def test_no_command_shows_the_help(vtexport) -> None:
    outcome = vtexport()
    assert outcome.code == 2
    assert "Commands:" in outcome.out


def test_build_run_inspect_show_from_nothing(vtexport, photo: Path, tmp_path: Path) -> None:
    schedule = ("--keep", "0.5", "--layers", "2,6,10")
    built = vtexport("build", "--model", "micro-llava", *schedule, "--out", "micro")
    assert built.code == 0, built.err
    said_all = ("sparsevlm, keep 0.5", "of 144, mean over decoder layers", "by SparseVLM's count", "decoder.2", "merged",
                "same kept tokens, same greedy tokens", "vtexport run micro --image", "of dense", "MB")  # fmt: skip
    for said in said_all:
        assert said in built.out
    for stage in ("trace", "14.4 MB written", "verify", "hash files"):
        assert stage in built.err
    assert {path.name for path in tmp_path.iterdir()} == {"micro"}

    again = vtexport("build", "--model", "micro-llava", "--keep", "0.5", "--out", "micro")
    check_refused(again, "give --force to replace it", tmp_path, ["micro"])

    example = next(iter(heldout.examples(1)))
    ran = vtexport("run", "micro", "--image", photo, "--prompt", example.question.text)
    assert ran.code == 0
    assert ran.out == f"{example.question.answer}\n"
    assert "of 144 visual tokens" in ran.err

    seen = vtexport("inspect", "micro", "--verify")
    assert "all as they were built" in seen.out
    assert "engine/weights.safetensors" in seen.out

    unasked = vtexport("show", "micro", "--image", photo, "-o", "kept.png")
    check_refused(unasked, "give a question as --prompt", tmp_path, ["micro"])
    drawn = vtexport("show", "micro", "--image", photo, "--prompt", example.question.text, "-o", "kept.png")
    assert drawn.out == "kept.png\n"
    picture = np.asarray(Image.open(tmp_path / "kept.png"), dtype=float)
    # The image, then one panel a stage, each with more cells dimmed.
    assert picture.shape == (62 + 508, 4 * 480 + 3 * 8, 3)
    light = [picture[-470:, left + 10 : left + 470].mean() for left in range(0, picture.shape[1], 488)]
    assert light == sorted(light, reverse=True)
    assert light[-1] < 0.7 * light[0]


def test_the_default_folder_says_what_it_holds(vtexport, tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    assert vtexport("build", "--model", "tiny", "--keep", "0.4", "--method", "random", "--seed", "3").code == 0
    assert (tmp_path / "tiny-random-0.4" / MANIFEST).is_file()
    manifest = json.loads(vtexport("inspect", "tiny-random-0.4", "--json").out)
    assert manifest["plans"][0]["options"] == {"seed": 3}
    assert vtexport("build", "--model", "tiny", "--method", "exit", "--layers", "1").code == 0
    assert json.loads(vtexport("inspect", "tiny-exit-1", "--json").out)["plans"][0]["keep"] == pytest.approx(
        2 / 3, abs=1e-4
    )
    assert vtexport("build", "--model", "tiny", "--method", "dense").code == 0
    assert (tmp_path / "tiny-dense-1" / MANIFEST).is_file()


def test_run_json_says_it_all(vtexport, micro_bundle: Path, photo: Path) -> None:
    pairs = ["what digit is red?", "where is the <image> 3?", "how many digits are there?"]
    arguments = [word for pair in pairs for word in ("--image", photo, "--prompt", pair)]
    outcome = vtexport("run", micro_bundle, *arguments, "--json", "--max-new-tokens", "4")
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert set(line) == {"text", "token_ids", "keep", "spread", "visual_tokens", "stages", "timings_ms"}
        assert (line["keep"], line["spread"]) == (0.25, None)
        assert line["visual_tokens"] == {"total": 144, "mean": 36.0, "mean_sparsevlm_count": 36.0}
        assert set(line["timings_ms"]) == {"preprocess", "vision", "prefill", "per_token"}
        (stage,) = line["stages"]
        assert set(stage) == {"where", "in", "kept", "recycled", "index", "grid"}
        assert (stage["where"], stage["in"], stage["kept"], stage["recycled"]) == ("vision", 144, 36, 0)
        assert stage["index"] == sorted(set(stage["index"]))
        assert stage["grid"] == [list(divmod(index, 12)) for index in stage["index"]]
        assert 1 <= len(line["token_ids"]) <= 4
    # The same image keeps the same tokens whatever is asked: this method does not look at the text.
    assert lines[0]["stages"] == lines[1]["stages"]


def test_merged_tokens_have_no_cell(vtexport, build_bundle, photo: Path) -> None:
    bundle = build_bundle(MICRO, 0.15, "pool")
    outcome = vtexport("run", bundle, "--image", photo, "--prompt", "how many digits are there?", "--json")
    (stage,) = json.loads(outcome.out)["stages"]
    assert (stage["kept"], stage["recycled"], stage["index"]) == (0, 20, [])
    assert stage["grid"] == [None] * 20


def test_a_batch_prints_numbered_answers(vtexport, micro_bundle: Path, photo: Path) -> None:
    examples = list(heldout.examples(2))
    arguments = [word for e in examples for word in ("--image", photo, "--prompt", e.question.text)]
    assert vtexport("run", micro_bundle, *arguments).out == "".join(
        f"{n}. {e.question.answer}\n" for n, e in enumerate(examples, start=1)
    )


def test_show_with_a_question_puts_the_answer_above_the_panels(
    vtexport, micro_bundle: Path, photo: Path, tmp_path: Path
) -> None:
    assert vtexport("show", micro_bundle, "--image", photo, "-o", "plain.png").code == 0
    asked = vtexport(
        "show", micro_bundle, "--image", photo, "--prompt", "how many digits are there?", "-o", "asked.png"
    )
    assert asked.code == 0
    plain, answered = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "asked.png"))
    assert len(answered) > len(plain)
    assert (answered[: -len(plain)] < 128).any()
    np.testing.assert_array_equal(plain, answered[-len(plain) :])
    # The answer is on the terminal as well, where it may have glyphs that no font here has.
    assert asked.out == "asked.png\n"
    assert asked.err.strip().isdecimal()


def test_profile_measures_both_sides(vtexport, micro_bundle: Path, tmp_path: Path) -> None:
    outcome = vtexport(
        "profile", micro_bundle, "--against", "dense", "--runs", "2", "--new-tokens", "3", "--batch", "2",
        "--json", "report.json", "--plot", "plot.png",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "first token" in outcome.out
    report = json.loads((tmp_path / "report.json").read_text())
    stages = {"preprocess", "vision", "prefill", "first_token", "per_token"}
    assert set(report["this"]["stages"]) == set(report["against"]["stages"]) == set(report["speedup"]) == stages
    assert report["against"]["mean_visual_tokens"] == 144
    for side in (report["this"], report["against"]):
        assert side["peak_memory_bytes"] > 50e6
        for stats in side["stages"].values():
            assert 0 < stats["median"] <= stats["p90"] <= stats["p99"]
    assert report["this"]["cache_bytes"] < report["against"]["cache_bytes"]
    assert report["flops_speedup"]["prefill"] > 2
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size[0] > 400


def test_profile_alone(vtexport, micro_bundle: Path) -> None:
    outcome = vtexport("profile", micro_bundle, "--runs", "1", "--new-tokens", "2")
    assert outcome.code == 0
    assert "speed-up" not in outcome.out


def test_eval_counts_exact_matches(vtexport, micro_bundle: Path) -> None:
    outcome = vtexport("eval", micro_bundle, "--limit", "40", "--json")
    score = json.loads(outcome.out)
    assert score["questions"] == 40
    assert 0.8 <= score["accuracy"] <= 1
    assert set(score["by_kind"]) == {"digit", "colour", "where", "count"}
    assert "all" in vtexport("eval", micro_bundle, "--limit", "8").out


def test_list_and_doctor(vtexport) -> None:
    listed = json.loads(vtexport("list", "--json").out)
    assert set(listed["methods"]) == {
        "dense", "sparsevlm", "sparsevlm-plus", "fastv", "pyramiddrop", "exit", "sgl",
        "fastervlm", "vtc-cls", "vispruner", "visionzip", "divprune", "cdpruner", "random", "pool",
    }  # fmt: skip
    assert set(listed["targets"]) == {"onnxruntime", "openvino", "tensorrt-rtx", "tensorrt", "tensorrt-llm"}
    assert "micro-llava" in listed["models"]
    plain = vtexport("list").out
    assert all(name in plain for names in listed.values() for name in names)
    health = json.loads(vtexport("doctor", "--json").out)
    assert health["targets"][0]["name"] == "onnxruntime"
    assert health["targets"][0]["run"]["works"] is True
    plain = vtexport("doctor").out
    assert health["versions"]["torch"] in plain
    # A machine that runs these tests has a compiler: an install that lost the twins would go unnoticed elsewhere.
    assert native.available("cpu")
    assert set(health) == {"versions", "targets", "cuda_kernels", "tensorrt_plugins"}
    assert health["cuda_kernels"]["works"] is native.available("cuda")
    assert "CUDA kernels" in plain
    assert "TensorRT plugins" in plain
    assert set(health["tensorrt_plugins"]) == {"works", "reason"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0"], "--keep 0 is out of range"),
        (["--keep", "-0.5"], "out of range"),
        (["--keep", "1.5"], "out of range"),
        (["--keep", "nan"], "--keep 'nan' cannot be read; give a number or auto"),
        (["--keep", "0.001", "--method", "fastervlm"], "leaves no image token of 144; the least"),
        (["--keep", "many"], "--keep 'many' cannot be read; give a number or auto"),
        ([], "--keep is missing"),
        (["--keep", "0.5", "--method", "best"], "unknown method 'best'; choose one of dense"),
        (["--keep", "0.5", "--method", "dense"], "has no effect with method dense"),
        (["--keep", "0.5", "--seed", "1"], "--seed has no effect with method sparsevlm"),
        (["--keep", "0.5", "--layers", "2,11"], "--layers 11 is out of range: this decoder has 12 layers"),
        (["--keep", "0.5", "--layers", "2,2"], "--layers names layer 2 twice"),
        (["--keep", "0.5", "--layers", "early"], "is not a list of numbers"),
        (["--keep", "0.5", "--layers", "1", "--method", "fastervlm"], "--layers has no effect with method fastervlm"),
        (["--keep", "0.5", "--layers", "1,2", "--method", "fastv"], "prunes once; give one layer"),
        (["--keep", "0.1", "--layers", "5"], "is out of reach of sparsevlm pruning after layers 5"),
        (["--keep", "0.05", "--method", "exit"], "--keep 0.05 is out of reach of exit"),
        (["--keep", "0.5", "--method", "exit", "--layers", "3"], "--keep has no effect where --layers fixes"),
        (["--schedule", "sparsevlm-192"], "is for 576 visual tokens and 32 layers"),
        (["--schedule", "sparsevlm-193"], "is no schedule of method sparsevlm; choose one of sparsevlm-192"),
        (["--schedule", "sparsevlm-192", "--keep", "0.5"], "--keep has no effect where --schedule fixes"),
        (["--schedule", "sparsevlm-192", "--rule", "rank"], "--rule has no effect with --schedule"),
        (
            ["--keep", "0.5", "--rule", "guess"],
            "--rule guess is unknown to method sparsevlm; choose one of rank, proportional",
        ),
        (["--keep", "0.5", "--no-recycle", "--merge", "sum"], "--merge has no effect with --no-recycle"),
        (
            ["--keep", "0.5", "--recycle-pool", "0"],
            "--recycle-pool 0 is out of range; give a number above 0 and at most 1",
        ),
        (["--keep", "0.5", "--merge", "max"], "--merge max is unknown to method sparsevlm; choose one of mean, sum"),
        (["--keep", "0.5", "--calibration", "nowhere.toml"], "no such calibration file"),
        (
            ["--keep", "0.5", "--calibration", "x.toml", "--method", "pool"],
            "--calibration has no effect with method pool",
        ),
        (["--keep", "0.5", "--give-ranking"], "but method sparsevlm drops some; use dense"),
        (["--keep", "0.5", "--method", "sgl", "--debug"], "--debug has no effect with method sgl"),
        (["--keep", "0.5", "--method", "fastv+sparsevlm"], "cannot be combined; give one vision-stage method"),
        (["--keep", "0.5", "--method", "sparsevlm+fastervlm"], "cannot be combined"),
        (["--keep", "0.5", "--method", "fastervlm+pool"], "cannot be combined"),
        (["--keep", "0.5", "--vision-keep", "0.7"], "--vision-keep has no effect with method sparsevlm"),
        (["--keep", "0.5", "--vision-keep", "0.4", "--method", "fastervlm+fastv"], "--vision-keep 0.4 is out of range"),
        (["--keep", "0.5", "--method", "vtc-cls", "--tower-from", "9"], "the tower has 5 layers up to"),
        (["--keep", "0.5", "--method", "vispruner", "--important", "2"], "--important 2 is out of range"),
        (["--keep", "0.5", "--method", "visionzip", "--contextual", "1"], "--contextual 1 is out of range"),
        (["--keep", "0.5", "--method", "pool", "--debug"], "--debug has no effect with method pool"),
        (["--keep", "0.5", "--target", "npu"], "unknown target 'npu'; choose one of onnxruntime"),
        (["--keep", "0.5", "--sm", "89"], "--sm has no effect with target onnxruntime"),
        (["--keep", "0.5", "--max-batch", "2"], "--max-batch has no effect with target onnxruntime"),
        (
            ["--keep", "0.5", "--dtype", "int3"],
            "--dtype int3 is unknown; choose one of fp32, fp16, bf16",
        ),
        (["--keep", "0.5", "--nonsense"], "No such option"),
    ],
)
def test_bad_options_of_build(vtexport, arguments: list[str], message: str, tmp_path: Path) -> None:
    check_refused(vtexport("build", "--model", "micro-llava", "--out", "out", *arguments), message, tmp_path)


def test_bad_models(vtexport, broken_models: dict[str, Path], tmp_path: Path) -> None:
    left = [folder.name for folder in broken_models.values()]
    for name, message in {
        "bert": "holds a 'bert' model, not LLaVA",
        "missing": "has no model.safetensors",
        "truncated": "truncated or not safetensors",
    }.items():
        outcome = vtexport("build", "--model", broken_models[name], "--keep", "0.5", "--out", "out")
        check_refused(outcome, message, tmp_path, left)
    outcome = vtexport("build", "--model", "llava-9000", "--keep", "0.5", "--out", "out")
    check_refused(outcome, "or one of llava-1.5-13b, llava-1.5-7b, llava-1.6-llama3-8b", tmp_path, left)


@pytest.fixture
def broken_models(tiny_checkpoint: Path, tmp_path: Path) -> dict[str, Path]:
    folders = {name: tmp_path / name for name in ("bert", "missing", "truncated")}
    for folder in folders.values():
        shutil.copytree(tiny_checkpoint, folder)
    (folders["bert"] / "config.json").write_text('{"model_type": "bert"}')
    (folders["missing"] / "model.safetensors").unlink()
    weights = folders["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folders


def test_bad_destinations(vtexport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = vtexport("build", "--model", "micro-llava", "--keep", "0.5", "--out", "/proc/nowhere/out")
    check_refused(outcome, "is not a writable folder; give another --out", tmp_path)
    from vtexport.bundle import writing

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _path: usage._replace(free=10))
    outcome = vtexport("build", "--model", "micro-llava", "--keep", "0.5", "--out", "out")
    check_refused(outcome, "free some space", tmp_path)


def test_a_target_that_is_not_installed(vtexport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if "tensorrt" in name else real(name, *rest)
    )
    outcome = vtexport("build", "--model", "micro-llava", "--keep", "0.5", "--target", "tensorrt-rtx", "--out", "out")
    check_refused(outcome, "pip install 'vtexport[tensorrt-rtx]'", tmp_path)
    assert "pip install 'vtexport[tensorrt-rtx]'" in vtexport("doctor").out


def test_bad_questions(vtexport, micro_bundle: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for arguments, message in (
        (["--image", photo], "--prompt is missing"),
        (["--prompt", "what?"], "0 --image and 1 --prompt given"),
        (["--image", photo, "--image", photo, "--prompt", "what?"], "2 --image and 1 --prompt given"),
        (
            ["--image", photo, "--prompt", "<image> <image> what?"],
            "2 <image> marks, this model was built for 1 per prompt",
        ),
        (["--image", photo, "--prompt", " "], "the prompt is empty"),
        (["--image", "nowhere.png", "--prompt", "what?"], "no such image"),
        (["--image", "text.png", "--prompt", "what?"], "not a readable image"),
        (["--image", photo, "--prompt", "what?", "--max-new-tokens", "0"], "0 is not in the range"),
        (["--image", photo, "--prompt", "what?", "--max-new-tokens", "5000"], "exceed the model's 2048 positions"),
    ):
        check_refused(vtexport("run", micro_bundle, *arguments), message, tmp_path, ["text.png"])


def test_bad_bundles(vtexport, bundle_copy: Path, photo: Path, tmp_path: Path) -> None:
    weights = bundle_copy / "engine" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 255
    weights.write_bytes(data)
    check_refused_inspect = vtexport("inspect", bundle_copy, "--verify")
    assert check_refused_inspect.code == 2
    assert check_refused_inspect.err.splitlines()[-1].endswith("was changed since the build; build the bundle again")
    manifest = json.loads((bundle_copy / MANIFEST).read_text())
    (bundle_copy / MANIFEST).write_text(json.dumps({**manifest, "schema_version": 1}))
    for command in (
        ["run", bundle_copy, "--image", photo, "--prompt", "what?"],
        ["show", bundle_copy, "--image", photo, "-o", "out.png"],
        ["profile", bundle_copy],
        ["eval", bundle_copy],
        ["inspect", bundle_copy],
    ):
        check_refused(vtexport(*command), "has schema version 1, this vtexport reads version 6", tmp_path, ["copy"])
    check_refused(vtexport("inspect", tmp_path), "has no manifest.json", tmp_path, ["copy"])


def test_bad_outputs(vtexport, micro_bundle: Path, photo: Path, tmp_path: Path) -> None:
    for command, message in (
        (["show", micro_bundle, "--image", photo, "-o", "kept.xyz"], "unknown image format"),
        (["show", micro_bundle, "--image", photo, "-o", "nowhere/kept.png"], "is not a folder"),
        (["profile", micro_bundle, "--json", "nowhere/report.json"], "is not a folder"),
        (["profile", micro_bundle, "--plot", "plot.xyz"], "unknown image format"),
        (["eval", micro_bundle, "--limit", "0"], "--limit 0 is out of range"),
    ):
        check_refused(vtexport(*command), message, tmp_path)
    for name, value, message in (
        ("--runs", 0, "'--runs': 0 is not in the range"),
        ("--batch", 0, "'--batch': 0 is not in the range"),
        ("--new-tokens", 1, "--new-tokens 1 is too small"),
    ):
        outcome = vtexport("profile", micro_bundle, name, value)
        assert outcome.code == 2
        assert message in outcome.err.splitlines()[-1]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vtexport.micro.pairs import write_pairs

    return write_pairs(tmp_path_factory.mktemp("pairs"), 4)


def test_calibrate_then_build_on_what_it_measured(vtexport, tiny_checkpoint: Path, pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    done = vtexport("calibrate", "--model", "tiny", "--data", pairs, "-o", "ranks.toml", "--plot", "ranks.png")
    assert done.code == 0, done.err
    assert "--layers auto" in done.out
    assert "measure pairs" in done.err
    found = Calibration.load(tmp_path / "ranks.toml")
    assert (found.pairs, found.num_visual_tokens, len(found.ranks)) == (4, 25, 3)
    # A rank is of a matrix with as many rows as raters, attention a share.
    assert all(1 <= rank <= 25 for rank in found.ranks)
    assert all(0 < mass < 1 for mass in found.mass)
    with Image.open(tmp_path / "ranks.png") as picture:
        assert picture.size[0] > 400
    first = (tmp_path / "ranks.toml").read_bytes()
    assert vtexport("calibrate", "--model", "tiny", "--data", pairs, "-o", "ranks.toml").code == 0
    assert (tmp_path / "ranks.toml").read_bytes() == first
    built = vtexport("build", "--model", "tiny", "--keep", "0.5", "--calibration", "ranks.toml", "--layers", "auto")
    assert built.code == 0, built.err
    plan = json.loads(vtexport("inspect", "tiny-sparsevlm-0.5", "--json").out)["plans"][0]
    assert tuple(int(layer) for layer in plan["options"]["layers"].split(",")) == found.pruning_layers(0.5)
    other = vtexport("build", "--model", "micro-llava", "--keep", "0.5", "--calibration", "ranks.toml", "--out", "out")
    assert other.code == 2
    assert "was calibrated on a model of 25 visual tokens and 3 layers" in other.err
    random_checkpoint(tmp_path / "other", seed=77)
    other = vtexport("build", "--model", "other", "--keep", "0.5", "--calibration", "ranks.toml", "--out", "out")
    assert "was calibrated on another checkpoint" in other.err


def test_bad_calibrations(vtexport, tiny_checkpoint: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text('{"picture": "a.png"}\n')
    (tmp_path / "lost.jsonl").write_text('{"image": "nowhere.png", "prompt": "what?"}\n')
    left = ["empty.jsonl", "lost.jsonl", "wrong.jsonl"]
    for data, out, more, message in (
        ("nowhere.jsonl", "ranks.toml", [], "no such file; give JSON lines"),
        ("empty.jsonl", "ranks.toml", [], "holds no usable pair"),
        ("wrong.jsonl", "ranks.toml", [], "wrong.jsonl, line 1: not a pair"),
        ("lost.jsonl", "ranks.toml", [], "no such image"),
        (pairs, "nowhere/ranks.toml", [], "is not a folder; give another -o"),
        (pairs, "ranks.toml", ["--plot", "plot.xyz"], "unknown image format"),
    ):
        outcome = vtexport("calibrate", "--model", tiny_checkpoint, "--data", data, "-o", out, *more)
        check_refused(outcome, message, tmp_path, left)
    outcome = vtexport(
        "calibrate", "--model", tiny_checkpoint, "--data", pairs, "-o", "ranks.toml", "--exit-tolerance", "1"
    )
    assert outcome.code == 2
    assert "--exit-tolerance 1 is out of range" in outcome.err.splitlines()[-1]
    for text in ("ranks = [", "ranks = [1.0]", "surprise = 1"):
        (tmp_path / "bad.toml").write_text(text)
        outcome = vtexport(
            "build", "--model", tiny_checkpoint, "--keep", "0.5", "--calibration", "bad.toml", "--out", "out"
        )
        check_refused(outcome, "is not a calibration", tmp_path, ["bad.toml", *left])


def test_a_small_models_ranking_prunes_a_large_one(
    vtexport, build_bundle, tiny_checkpoint: Path, micro_bundle: Path, photo: Path, tmp_path: Path
) -> None:
    ranker = build_bundle(tiny_checkpoint, 1.0, "dense", give_ranking=True)
    pruned = build_bundle(tiny_checkpoint, 0.6, "sgl")
    asked = ["--image", photo, "--prompt", "how many digits are there?"]
    outcome = vtexport("run", pruned, *asked, "--ranking-from", ranker, "--max-new-tokens", "4", "--json")
    assert outcome.code == 0, outcome.err
    line = json.loads(outcome.out)
    assert line["timings_ms"]["ranking"] > 0
    (stage,) = line["stages"]
    assert stage["in"] == 25 > stage["kept"] == len(stage["index"])
    assert vtexport("show", pruned, *asked, "--ranking-from", ranker, "-o", "kept.png").code == 0
    (tmp_path / "kept.png").unlink()
    for command, message in (
        (["run", pruned, *asked], "give that bundle as --ranking-from"),
        (["run", micro_bundle, *asked, "--ranking-from", ranker], "--ranking-from has no effect with method fastervlm"),
        (["run", pruned, *asked, "--ranking-from", pruned], "gives no ranking; build it with --method dense"),
        (["run", pruned, *asked, "--ranking-from", "nowhere"], "nowhere is not a folder"),
        (["profile", pruned], "waits for another bundle's ranking"),
    ):
        check_refused(vtexport(*command), message, tmp_path)
    other = build_bundle(MICRO, 1.0, "dense", give_ranking=True, self_check=False)
    refused = vtexport("run", pruned, *asked, "--ranking-from", other)
    check_refused(refused, "ranks 144 visual tokens but 25 enter", tmp_path)
