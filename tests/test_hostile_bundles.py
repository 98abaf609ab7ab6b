"""Bundles that strangers or accidents have changed: refused in one line, before anything of them is used."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.conftest import check_refused, noise_images
from vtexport.bundle.folder import Bundle
from vtexport.bundle.manifest import MANIFEST
from vtexport.errors import BundleError, InputError, printable
from vtexport.models import resolve
from vtexport.pruning.calibration import Calibration
from vtexport.runtime.runner import Runner
from vtexport.targets.external import check_graph

DATA = Path(__file__).parent / "data" / "bundle-schema-6"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of a small bundle."""
    return Path(shutil.copytree(DATA, tmp_path / "bundle"))


def change(folder: Path, edit: Change) -> None:
    """Change the manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Change a file, and the manifest with it."""
    (folder / name).write_bytes(data)

    def entry(manifest: dict[str, Any]) -> None:
        found = next(one for one in manifest["files"] if one["path"] == name)
        found |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    change(folder, entry)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(folder)
    assert len(str(caught.value).splitlines()) == 1


# Paths


def test_a_graph_lies_inside_and_is_listed(bundle: Path) -> None:
    shutil.copytree(bundle / "engine", bundle.parent / "outside")
    change(bundle, lambda m: m["target"]["graphs"].update(vision="../outside/vision.onnx"))
    refused(bundle, "which files do not list")


@pytest.mark.parametrize("name", ["engine", "engine/vision.onnx", "manifest.json", "processor/config.json"])
def test_links_are_refused(bundle: Path, name: str) -> None:
    outside = bundle.parent / "outside"
    shutil.move(bundle / name, outside)
    (bundle / name).symlink_to(outside)
    refused(bundle, r"is a link or no regular file; copy the bundle with cp -rL")


def test_a_pipe_is_not_waited_for(bundle: Path) -> None:
    os.mkfifo(bundle / "pipe")
    refused(bundle, "no regular file")
    (bundle / "pipe").unlink()
    (bundle / MANIFEST).unlink()
    os.mkfifo(bundle / MANIFEST)
    refused(bundle, "has no manifest.json")


@pytest.mark.parametrize("name", ["processor/chat_template.json", "processor/tool.py", "engine/more.safetensors"])
def test_what_a_loader_would_pick_up_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).write_text("{}")
    refused(bundle, f"{name} is not one of the files of this bundle; remove it")


def test_other_files_are_told_by_inspect(bundle: Path, vtexport) -> None:
    (bundle / "notes.txt").write_text("mine")
    outcome = vtexport("inspect", bundle, "--verify")
    assert outcome.code == 0
    assert "all as they were built, and besides these: notes.txt" in outcome.out


@pytest.mark.parametrize("location", ["../outside", "/etc/passwd", "missing", "engine/../engine/model.safetensors"])
def test_weights_lie_beside_their_graph(bundle: Path, location: str) -> None:
    path = bundle / "engine" / "vision.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = onnx.TensorProto(name="hidden", data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    node = onnx.helper.make_node("Constant", [], ["hidden"], value=tensor)
    model.functions.append(onnx.helper.make_function("d", "f", [], ["hidden"], [node], []))
    rewrite(bundle, "engine/vision.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match="which is no file beside it"):
        Runner.open(bundle).engine.load()
    with pytest.raises(BundleError, match="which is no file beside it"):
        check_graph(path)


@pytest.mark.parametrize(("graph", "output"), [("vision", "visual"), ("language", "logits")])
def test_a_graph_without_what_is_read_is_refused(bundle: Path, graph: str, output: str) -> None:
    file = f"engine/{graph}.onnx"
    model = onnx.load(bundle / file, load_external_data=False)
    (port,) = (port for port in model.graph.output if port.name == output)
    model.graph.output.remove(port)
    rewrite(bundle, file, model.SerializeToString())
    with pytest.raises(BundleError, match=f"a graph of this bundle gives no {output}.*; build the bundle again"):
        Runner.open(bundle).ask([(noise_images(1)[0], "what?")], 1)


# Bytes


@pytest.mark.parametrize("name", ["engine/vision.onnx", "processor/tokenizer.json", "processor/chat_template.jinja"])
def test_a_changed_byte_is_found_at_once(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    refused(bundle, "was changed since the build")


@pytest.mark.parametrize("name", ["engine/vision.onnx", "engine/language.onnx", "engine/model.safetensors"])
@pytest.mark.parametrize("data", [b"", b"\xff" * 5000, b"\x08\x09"], ids=["empty", "noise", "no graph"])
def test_a_graph_that_is_none_is_one_line(bundle: Path, vtexport, photo: Path, name: str, data: bytes) -> None:
    rewrite(bundle, name, data)
    outcome = vtexport("run", bundle, "--image", photo, "--prompt", "what?")
    check_refused(outcome, "build the bundle again", bundle.parent, ["bundle"])


# Numbers


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["plans"][0].update(num_layers=2**62),
        lambda m: m["plans"][0].update(num_layers=2**70),
        lambda m: m["plans"][0].update(num_layers=4),
        lambda m: m["plans"][0].update(keep=-1),
        lambda m: m["plans"][0].update(mean_visual_tokens=1.0),
        lambda m: m["plans"][0].update(views=2),
        lambda m: m["plans"][0]["stages"][1].update(where="decoder.3"),
        lambda m: m["plans"][0]["stages"][1].update(where="decoder.99999999"),
        lambda m: m["plans"][0]["stages"][1].update(recycled=17),
        lambda m: m["plans"][0]["stages"].reverse(),
        lambda m: m["plans"][0]["options"].update(recycle_pool=7),
        lambda m: m["plans"].clear(),
        lambda m: m.update(adaptive={"limits": [1.0], "target_accuracy": 1, "accuracy": 1}),
        lambda m: m["model"].update(eos_token_ids=[3]),
        lambda m: m["model"].update(eos_token_ids=[-1]),
        lambda m: m["model"].update(vocabulary=385),
        lambda m: m["model"].update(max_positions=1 << 60),
        lambda m: m["model"]["config"]["text_config"].update(hidden_size=128),
        lambda m: m["model"]["views"].update(asked={"images": 3}),
        lambda m: m["model"]["views"].update(asked={"surprise": 3}),
        lambda m: m["target"].update(dtype="fp7"),
        lambda m: m["target"].update(name="surprise"),
        lambda m: m["target"]["options"].update(surprise=1),
        lambda m: m["target"]["graphs"].update(surprise="engine/vision.onnx"),
        lambda m: m["files"].append(m["files"][0]),
        lambda m: m["files"][0].update(bytes=-1),
        lambda m: m["files"][0].update(sha256="0"),
        lambda m: m["graphs"]["vision"]["inputs"][0].update(shape=[-1]),
    ],
)
def test_a_manifest_that_cannot_be_is_damaged(bundle: Path, edit: Change) -> None:
    change(bundle, edit)
    refused(bundle, "is damaged")


def test_limits_of_several_plans_are_finite_and_descend(bundle: Path) -> None:
    def adaptive(limits: list[float]) -> Change:
        entry = {"limits": limits, "target_accuracy": 1, "accuracy": 1}
        return lambda m: m.update(adaptive=entry, plans=m["plans"][:1] * (1 + len(limits)))

    change(bundle, adaptive([2.0, 1.0]))
    Bundle.open(bundle)
    change(bundle, adaptive([1.0, 2.0]))
    refused(bundle, "limits that ascend")
    text = (bundle / MANIFEST).read_text()
    for number in ("NaN", "1e999", "-1"):
        (bundle / MANIFEST).write_text(text.replace("[1.0, 2.0]", f"[{number}, 1.0]"))
        refused(bundle, "manifest")


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"schema_version": 6, "model": ' + b"[" * 100_000, b" " * (9 << 20)]
)
def test_depth_and_size_are_bounded(bundle: Path, data: bytes) -> None:
    (bundle / MANIFEST).write_bytes(data)
    refused(bundle, "nested too deeply|larger than|Expected `object`")


# Other schemas


def test_an_earlier_schema_is_refused_with_its_command(bundle: Path) -> None:
    command = (
        "build the bundle again with this vtexport: vtexport build --model /tmp/x/tiny-llava --method "
        r"fastervlm\+sparsevlm --layers 0 --recycle-pool 0.5 --vision-keep 0.7071 --keep 0.5 --target onnxruntime "
        f"--dtype fp32 --out {bundle} --force$"
    )
    change(bundle, lambda m: m.update(schema_version=5))
    refused(bundle, rf"schema version 5, this vtexport reads version 6; {command}")
    change(bundle, lambda m: m.update(schema_version=7))
    refused(bundle, "schema version 7, this vtexport reads version 6; upgrade vtexport$")


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_every_earlier_schema_names_what_it_was_built_from(bundle: Path, version: int) -> None:
    plan = {"method": "fastv", "keep": 0.25, "options": {"layer": 2}, "stages": []}
    header: dict[str, Any] = {
        "schema_version": version,
        "model": {"name": "my models/llava", "config": {}},
        "target": {"name": "tensorrt-rtx", "dtype": "fp16", "options": {"max_batch": 8}},
    }
    header |= {"plan": plan} if version < 3 else {"plans": [plan]}
    (bundle / MANIFEST).write_text(json.dumps(header))
    refused(bundle, "vtexport build --model 'my models/llava' --method fastv --keep 0.25 --target tensorrt-rtx")
    (bundle / MANIFEST).write_text(json.dumps({"schema_version": version, "model": []}))
    refused(bundle, "build the bundle again with this vtexport$")


def test_the_command_of_several_plans_and_of_an_exit(bundle: Path) -> None:
    from vtexport.bundle.earlier import build_command

    model = {"name": "micro-llava", "views": {"asked": {"images": 2}}}
    plans = [{"method": "fastervlm", "keep": keep, "options": {}} for keep in (0.5, 0.25)]
    text = build_command({"model": model, "plans": plans, "adaptive": {}, "target": {}}, bundle)
    assert shlex.split(text or "")[2:-3] == shlex.split(
        "--model micro-llava --method fastervlm --keep auto --buckets 0.5,0.25 --images 2"
    )
    plan = {"method": "exit", "keep": 0.9, "options": {"layers": "4"}}
    text = build_command({"model": {"name": "micro-llava"}, "plans": [plan]}, bundle)
    assert shlex.split(text or "")[2:-3] == shlex.split("--model micro-llava --method exit --layers 4")


# Calibrations, recipes, terminals


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pairs = 576", "pairs = -1"),
        ("pairs = 576", "pairs = " + "9" * 5000),
        ("num_visual_tokens = 144", "num_visual_tokens = 1e3"),
        ("num_visual_tokens = 144", "num_visual_tokens = 2"),
        ("ranks = [3.094,", "ranks = [nan,"),
        ("ranks = [3.094,", "ranks = [-inf,"),
        ("layers = [[2],", "layers = [[12],"),
        ("layers = [[2],", "layers = [[2, 2],"),
        ("keeps = [0.5,", "keeps = [0,"),
        ("exit_layer = 10", "exit_layer = 12"),
        ("agreement = [0.9896,", "agreement = ["),
        ("spread = [6.035,", "spread = [60,"),
        ('method = "fastervlm"', 'method = "sparsevlm"'),
        ("model =", "model = " + "[" * 100_000),
        ("model =", "model = \xff"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "calibration.toml"
    text = (resolve.engines_folder() / "micro-llava" / "calibration.toml").read_text()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode("latin-1"))
    with pytest.raises(InputError, match=r"is not a calibration \(.*\); write it anew with vtexport calibrate"):
        Calibration.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "summary = 1",
        'summary = "a"\nhub = "b"\ncheckpoint = "c"',
        'a = "b"',
        "=",
        'summary = "a\\u001b"\nhub = "b"',
    ],
)
def test_a_broken_recipe_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(resolve, "engines_folder", lambda: tmp_path)
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(InputError, match=r"mine\.toml"):
        resolve.resolve_model("mine")


def test_nothing_printed_moves_a_cursor(bundle: Path, vtexport) -> None:
    text = "a\x1b[2J\r\n\u202eb\ttab é"
    assert printable(text) == r"a\x1b[2J\r\n\u202eb\ttab é"
    assert str(BundleError(text)) == r"a\x1b[2J \u202eb\ttab é"
    change(bundle, lambda m: m["target"]["versions"].update({"\x1b[31m": "\x9b2J\nx"}))
    for arguments in (["inspect", bundle], ["inspect", bundle, "--json"]):
        outcome = vtexport(*arguments)
        assert outcome.code == 0
        assert not set(outcome.out) & {"\x1b", "\x9b"}
    change(bundle, lambda m: m["target"].update(name="\x1b[31m"))
    outcome = vtexport("inspect", bundle)
    assert (outcome.code, outcome.out) == (2, "")
    assert "\x1b" not in outcome.err


@pytest.mark.parametrize("name", ["a" * 5000, "~nouser", "a/" * 3000, "manifest.json"])
@pytest.mark.parametrize(
    "command",
    [
        "run {} --image a.png --prompt b",
        "inspect {}",
        "show {} --image a.png -o a.png",
        "serve {}",
        "deploy {} --to triton out",
    ],
)
def test_commands_refuse_what_is_no_bundle(vtexport, tmp_path: Path, command: str, name: str) -> None:
    outcome = vtexport(*(word.format(name) for word in command.split()))
    check_refused(outcome, "is not a folder; give a bundle made by vtexport build", tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        "run {} --image {}/x --prompt b",
        "inspect {} --verify",
        "show {} --image {}/x -o a.png",
        "serve {}",
        "deploy {} --to triton out",
        "profile {}",
    ],
)
def test_commands_refuse_a_hostile_bundle(bundle: Path, vtexport, command: str) -> None:
    change(bundle, lambda m: m["plans"][0].update(num_layers=2**62))
    outcome = vtexport(*(word.format(bundle) for word in command.split()))
    check_refused(outcome, "is damaged", bundle.parent, ["bundle"])
