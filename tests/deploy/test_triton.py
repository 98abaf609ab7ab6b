"""`vtexport deploy --to triton`: the repository's files, and the plain graphs in it; no server is needed."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from tests.checkpoints import MICRO
from tests.conftest import BuildBundle, check_refused, noise_images
from tests.deploy.model_config import kind_name, parsed, type_name
from vtexport.bundle.folder import Bundle
from vtexport.bundle.manifest import MANIFEST, Manifest, encode
from vtexport.deploy.roads import ROADS, deploy
from vtexport.runtime.runner import Runner
from vtexport.targets.engine import PrefillInput
from vtexport.targets.language import LANGUAGE, LanguageCalls

ROAD = ROADS["triton"]


def deployed(bundle: Path, out: Path) -> Path:
    assert deploy(Bundle.open(bundle), ROAD, out) == f"tritonserver --model-repository {out}/models"
    return out


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def config(model: Path) -> Any:
    return parsed((model / "config.pbtxt").read_text("utf-8"))


def altered(folder: Path, **changes: Any) -> Bundle:
    """The bundle in `folder` after changes of its manifest's target; graphs are files of a few bytes if they change."""
    manifest: Manifest = Bundle.open(folder).manifest
    files = list(manifest.files)
    for graph in changes.get("graphs", {}).values():
        (folder / graph).write_bytes(b"plan")
        digest = hashlib.sha256(b"plan").hexdigest()
        files.append(msgspec.structs.replace(files[0], path=graph, bytes=4, sha256=digest))
    target = msgspec.structs.replace(manifest.target, **changes)
    (folder / MANIFEST).write_bytes(encode(msgspec.structs.replace(manifest, target=target, files=files)))
    return Bundle.open(folder)


# The repository


def test_the_command_writes_a_repository_that_is_whole(vtexport, micro_bundle: Path, tmp_path: Path) -> None:
    outcome = vtexport("deploy", micro_bundle, "--to", "triton", "served")
    assert (outcome.code, outcome.out) == (0, "served\n")
    assert outcome.err == "start it with: tritonserver --model-repository served/models\n"
    shutil.move(tmp_path / "served", tmp_path / "elsewhere")
    model = tmp_path / "elsewhere" / "models" / "vtexport"
    inside = [f"1/bundle/{name}" for name in tree(micro_bundle)]
    assert tree(model) == sorted(["config.pbtxt", "1/model.py", *inside])
    Bundle.open(model / "1" / "bundle").verify(lambda _: None)
    assert (model / "1/bundle/engine/weights.safetensors").samefile(micro_bundle / "engine/weights.safetensors")
    assert not [path for path in (tmp_path / "elsewhere").rglob("*") if path.is_symlink()]


def test_the_model_finds_the_bundle_beside_itself(micro_bundle: Path, tmp_path: Path) -> None:
    version = deployed(micro_bundle, tmp_path / "out") / "models" / "vtexport" / "1"
    spec = importlib.util.spec_from_file_location("model_of_a_repository", version / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TritonPythonModel.bundle == version / "bundle"
    assert {"initialize", "execute"} <= set(dir(module.TritonPythonModel))


def test_files_are_copied_where_they_cannot_be_linked(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    inside = deployed(micro_bundle, tmp_path / "out") / "models/vtexport/1/bundle"
    Bundle.open(inside).verify(lambda _: None)
    assert not (inside / MANIFEST).samefile(micro_bundle / MANIFEST)


def test_questions_are_answered_in_batches_and_piece_by_piece(micro_bundle: Path, tmp_path: Path) -> None:
    found = config(deployed(micro_bundle, tmp_path / "out") / "models" / "vtexport")
    assert (found.name, found.backend, found.max_batch_size) == ("vtexport", "python", 8)
    assert found.model_transaction_policy.decoupled
    assert found.dynamic_batching.max_queue_delay_microseconds > 0
    assert [(kind_name(group.kind), group.count) for group in found.instance_group] == [("KIND_CPU", 1)]
    ports = [(port.name, type_name(port.data_type), list(port.dims), port.optional) for port in found.input]
    assert ports[:2] == [("IMAGE", "TYPE_STRING", [1], False), ("PROMPT", "TYPE_STRING", [1], True)]
    assert {port[0] for port in ports if port[3]} == {"PROMPT", "MESSAGES", "MAX_NEW_TOKENS", "STREAM"}
    outputs = {port.name: list(port.dims) for port in found.output}
    assert outputs == {"TEXT": [1], "TOKEN_IDS": [-1], "FINISHED": [1], "FINISH_REASON": [1], "VISUAL_TOKENS": [1]}


# The plain graphs


def test_the_graphs_have_the_ports_of_the_manifest(micro_bundle: Path, tmp_path: Path) -> None:
    out, graphs = deployed(micro_bundle, tmp_path / "out"), Bundle.open(micro_bundle).manifest.graphs
    assert sorted(path.name for path in (out / "graphs").iterdir()) == ["vtexport_language", "vtexport_vision"]
    vision = config(out / "graphs" / "vtexport_vision")
    assert (vision.backend, vision.max_batch_size, vision.default_model_filename) == ("onnxruntime", 8, "vision.onnx")
    assert [(port.name, type_name(port.data_type), list(port.dims)) for port in vision.input] == [
        ("pixel_values", "TYPE_FP32", [3, *graphs["vision"].inputs[0].shape[2:]])
    ]
    assert [port.name for port in vision.output] == [port.name for port in graphs["vision"].outputs]
    language = config(out / "graphs" / "vtexport_language")
    # Lengths and positions have layers in front: Triton cannot put requests together.
    assert language.max_batch_size == 0
    for ports, entries in ((language.input, graphs[LANGUAGE].inputs), (language.output, graphs[LANGUAGE].outputs)):
        assert [port.name for port in ports] == [entry.name for entry in entries]
        for port, entry in zip(ports, entries, strict=True):
            assert list(port.dims) == [size if isinstance(size, int) else -1 for size in entry.shape]


def test_an_output_without_extents_besides_the_batch_is_reshaped(adaptive_bundle: Path, tmp_path: Path) -> None:
    found = config(deployed(adaptive_bundle, tmp_path / "out") / "graphs" / "vtexport_vision")
    spread = next(port for port in found.output if port.name == "spread")
    assert (list(spread.dims), spread.HasField("reshape"), list(spread.reshape.shape)) == ([1], True, [])
    assert not any(port.HasField("reshape") for port in found.output if port.name != "spread")


@pytest.mark.parametrize("method", ["fastervlm", "sparsevlm"])
def test_stock_onnx_runtime_runs_the_graphs_on_buffers_of_its_own(
    build_bundle: BuildBundle, tmp_path: Path, method: str
) -> None:
    """As Triton's backend does: no cache is updated in place, and there are no files but those of the graph."""
    bundle = build_bundle(MICRO, 0.25, method)
    graphs = shutil.move(deployed(bundle, tmp_path / "out") / "graphs", tmp_path / "graphs")
    sessions = {
        name: onnxruntime.InferenceSession(graphs / f"vtexport_{name}" / "1" / f"{name}.onnx")
        for name in ("vision", LANGUAGE)
    }

    def run(name: str, given: dict[str, Any]) -> dict[str, Any]:
        names = [port.name for port in sessions[name].get_outputs()]
        return dict(zip(names, sessions[name].run(names, given), strict=True))

    runner, (image,) = Runner.open(bundle), noise_images(1)
    request, (answer,) = runner.request(image, "what digit is red?"), runner.ask([(image, "what digit is red?")], 4)
    visual = run("vision", {"pixel_values": request.views.pixels})["visual"]
    ids = np.array([request.prompt.token_ids])
    (at,), text, plan = request.prompt.image_positions, ids.shape[1], runner.plan
    calls = LanguageCalls(runner.plans)
    prompt = calls.prefill(PrefillInput(ids, np.array([at]), np.array([text]), visual), 0)
    length = text + np.array(plan.per_layer, dtype=np.int64)[:, None]
    caches = {}
    for port in sessions[LANGUAGE].get_inputs():
        if port.name.startswith("past."):
            layer = int(port.name.split(".")[1])
            shape = (1, port.shape[1], int(length[layer, 0]) + 4, port.shape[3])
            caches[port.name] = np.zeros(shape, np.float32)
    given, tokens = prompt, []
    ahead = 0 if plan.positions == "compact" else text + plan.vision_tokens - length
    for step in range(len(answer.token_ids)):
        outputs = run(LANGUAGE, {**given, **caches})
        tokens.append(int(outputs["logits"].argmax()))
        caches = {name: outputs[name.replace("past", "present")] for name in caches}
        now = length + step
        given = calls.decode(prompt, np.array(tokens[-1:]), now, now + ahead)
    assert tokens == answer.token_ids


def test_a_tensorrt_bundle_runs_on_gpus_and_keeps_its_language_plan(bundle_copy: Path, tmp_path: Path) -> None:
    plans = {"vision": "engine/vision.plan", LANGUAGE: "engine/language.plan"}
    options = {"max_batch": 4, "max_text": 512, "strip_weights": False}
    bundle = altered(bundle_copy, name="tensorrt", options=options, graphs=plans, dtype="fp16")
    out = deployed(bundle.folder, tmp_path / "out")
    answering = config(out / "models" / "vtexport")
    assert answering.max_batch_size == 4
    assert [kind_name(group.kind) for group in answering.instance_group] == ["KIND_GPU"]
    assert tree(out / "graphs") == ["vtexport_vision/1/vision.plan", "vtexport_vision/config.pbtxt"]
    vision = config(out / "graphs" / "vtexport_vision")
    assert (vision.backend, vision.max_batch_size) == ("tensorrt", 4)
    assert [kind_name(group.kind) for group in vision.instance_group] == ["KIND_GPU"]

    stripped = altered(bundle_copy, options={**options, "strip_weights": True})
    assert not (deployed(stripped.folder, tmp_path / "stripped") / "graphs").exists()


def test_an_openvino_bundle_has_no_plain_graphs(build_bundle: BuildBundle, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    out = deployed(build_bundle(target="openvino"), tmp_path / "out")
    assert [path.name for path in out.iterdir()] == ["models"]


def test_every_picture_of_a_prompt_is_an_element(build_bundle: BuildBundle, tmp_path: Path) -> None:
    from tests.checkpoints import family_checkpoint
    from vtexport.models.spec import ViewChoice

    checkpoint = family_checkpoint(tmp_path / "video", "video_llava", seed=1)
    bundle = build_bundle(checkpoint, 0.5, "fastervlm", views=ViewChoice())
    found = config(deployed(bundle, tmp_path / "out") / "models" / "vtexport")
    assert list(found.input[0].dims) == [Bundle.open(bundle).spec().views.pictures]
    assert found.input[0].dims[0] > 1


# Refusals


def test_what_cannot_be_deployed_is_refused_before_anything_is_written(
    vtexport, bundle_copy: Path, tmp_path: Path
) -> None:
    def refused(message: str, *words: object) -> None:
        check_refused(vtexport("deploy", *words), message, tmp_path, ["copy"])

    refused("is not a folder; give a bundle", "nowhere", "--to", "triton", "out")
    refused("already holds a bundle; give another OUT", bundle_copy, "--to", "triton", bundle_copy)
    refused("'--to'", bundle_copy, "out")
    refused("'--to'", bundle_copy, "--to", "somewhere", "out")
    for name in ("tensorrt-rtx", "tensorrt-llm"):
        altered(bundle_copy, name=name, options={})
        refused(f"was built for {name}", bundle_copy, "--to", "triton", "out")
    (tmp_path / "copy" / "engine" / "vision.onnx").unlink()
    refused("vision.onnx is missing; build the bundle again", bundle_copy, "--to", "triton", "out")


def test_a_bundle_that_needs_another_is_refused(
    vtexport, build_bundle: BuildBundle, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = build_bundle(tiny_checkpoint, 0.6, "sgl")
    outcome = vtexport("deploy", bundle, "--to", "triton", "out")
    check_refused(outcome, "prunes by another bundle's ranking", tmp_path)


def test_a_full_disk_leaves_nothing(
    vtexport, micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    check_refused(vtexport("deploy", micro_bundle, "--to", "triton", "out"), "No space left", tmp_path)
