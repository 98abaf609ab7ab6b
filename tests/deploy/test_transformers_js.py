"""Bundles as transformers.js loads them: on Node where it is installed, and on a stand-in that feeds the graphs as it does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tests.checkpoints import MICRO, family_checkpoint
from tests.conftest import BuildBundle, Outcome, check_refused, noise_images
from vtexport.bundle.folder import Bundle
from vtexport.deploy.roads import ROADS, deploy
from vtexport.deploy.transformers_js import weights
from vtexport.deploy.transformers_js.files import write_files
from vtexport.micro import heldout
from vtexport.models.spec import ViewChoice
from vtexport.runtime.runner import Runner

ROAD = ROADS["transformers.js"]
QUESTION = "what digit is red?"
#: methods of both stages, and how often positions and counts differ between layers
METHODS: list[tuple[str, float | None, dict[str, Any]]] = [
    # In its own dtype, the checkpoint's file is linked into the bundle.
    ("fastervlm", 0.25, {"dtype": "fp16"}),
    ("sparsevlm", 0.25, {}),
    ("fastervlm+fastv", 0.3, {"method_options": {"positions": "original"}}),
]
MORE: list[tuple[str, float | None, dict[str, Any]]] = [
    ("dense", None, {}),
    ("visionzip", 0.5, {}),
    ("pool", 0.25, {}),
    ("pyramiddrop", 0.4, {}),
    ("exit", 0.4, {}),
    ("sparsevlm", 0.25, {"target_options": {"quantize": "int8"}}),
    ("fastv", 0.4, {"target_options": {"quantize": "int4"}, "dtype": "fp16"}),
]
CASES = [*METHODS, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)]
NODE_MODULES = Path(os.environ.get("VTEXPORT_NODE_MODULES", "node_modules"))
needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (NODE_MODULES / "@huggingface" / "transformers").is_dir(),
    reason="needs node, and transformers.js in the folder that VTEXPORT_NODE_MODULES names",
)


def asked(folder: Path, count: int) -> list[tuple[Path, str]]:
    """Held-out questions, with their images as files."""
    pairs = []
    for number, example in enumerate(heldout.examples(count)):
        path = folder / f"{number}.png"
        Image.fromarray(example.image).save(path)
        pairs.append((path, example.question.text))
    return pairs


class StandIn:
    """Runs the graphs of a folder as transformers.js 4.3 does, of which this is all that reaches them."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.processor = json.loads((folder / "processor_config.json").read_text())
        self.images = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        suffixes = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}
        names = self.config["transformers.js_config"]["dtype"]
        self.sessions = {
            name: ort.InferenceSession(folder / "onnx" / f"{name}{suffixes[dtype]}.onnx")
            for name, dtype in names.items()
        }

    def answer(self, photo: Path, question: str, new_tokens: int) -> list[int]:
        """The tokens that it generates, up to an end token."""
        pixels = self.images(Image.open(photo).convert("RGB"), return_tensors="np")["pixel_values"]
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        mark, patch = self.processor["image_token"], self.processor["patch_size"]
        count = (pixels.shape[2] // patch) * (pixels.shape[3] // patch) + self.processor["num_additional_image_tokens"]
        ids = np.array([self.tokenizer(text.replace(mark, mark * count, 1))["input_ids"]], dtype=np.int64)
        embeds = self._embed(ids)
        features = self.sessions["vision_encoder"].run(["image_features"], {"pixel_values": pixels})[0]
        places = np.flatnonzero(ids[0] == self.config["image_token_index"])
        rows = features.reshape(-1, features.shape[-1])
        assert len(places) == len(rows)
        embeds[0, places] = rows
        decoder, past = self.sessions["decoder_model_merged"], self._nothing()
        names = [port.name for port in decoder.get_outputs()]
        tokens: list[int] = []
        while len(tokens) < new_tokens:
            outputs = dict(zip(names, decoder.run(names, {"inputs_embeds": embeds, **past}), strict=True))
            tokens.append(int(outputs.pop("logits")[0, -1].argmax()))
            past = {name.replace("present", "past_key_values"): array for name, array in outputs.items()}
            if tokens[-1] in self.config["eos_token_id"]:
                break
            embeds = self._embed(np.array([[tokens[-1]]], dtype=np.int64))
        self.cached = [past[f"past_key_values.{layer}.key"].shape[2] for layer in range(len(past) // 2)]
        return tokens

    def logits(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Logits of the token behind prompts of text alone."""
        feeds = {"inputs_embeds": self._embed(ids.astype(np.int64)), **self._nothing()}
        found: np.ndarray[Any, Any] = self.sessions["decoder_model_merged"].run(["logits"], feeds)[0]
        return found

    def _nothing(self) -> dict[str, np.ndarray[Any, Any]]:
        """Caches before the prompt."""
        ports = self.sessions["decoder_model_merged"].get_inputs()
        return {port.name: _empty(port) for port in ports if port.name != "inputs_embeds"}

    def _embed(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        embeds: np.ndarray[Any, Any] = self.sessions["embed_tokens"].run(["inputs_embeds"], {"input_ids": ids})[0]
        return embeds


def _empty(port: Any) -> np.ndarray[Any, Any]:
    """A cache before the prompt: extents with a name are 0."""
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[port.type]
    return np.zeros([extent if isinstance(extent, int) else 0 for extent in port.shape], dtype=dtype)


@pytest.mark.parametrize(("method", "keep", "more"), CASES)
def test_the_graphs_answer_as_the_bundle_does(
    method: str, keep: float | None, more: dict[str, Any], build_bundle: BuildBundle, tmp_path: Path
) -> None:
    bundle = build_bundle(MICRO, keep, method, self_check=False, **more)
    out = tmp_path / "out"
    deploy(Bundle.open(bundle), ROAD, out)
    for graph in (out / "onnx").glob("*.onnx"):
        onnx.checker.check_model(graph)
    stand_in, runner = StandIn(out), Runner.open(bundle)
    for photo, question in asked(tmp_path, 12):
        (answer,) = runner.ask([(runner.prompter.open_pictures([photo]), question)], 12)
        assert stand_in.answer(photo, question, 12) == answer.token_ids
    text = len(runner.prompter.prompt(question).token_ids)
    generated = len(answer.token_ids) - 1
    assert stand_in.cached == [text + generated + visual for visual in runner.plan.per_layer]


@pytest.mark.parametrize("method", ["fastervlm", "sparsevlm"])
def test_a_head_that_is_the_embedding_stays_in_the_decoder(
    method: str, build_bundle: BuildBundle, tmp_path: Path
) -> None:
    folder = family_checkpoint(tmp_path, "llava", tie_word_embeddings=True)
    bundle = build_bundle(folder, 0.5, method, self_check=False)
    deploy(Bundle.open(bundle), ROAD, tmp_path / "out")
    runner, photo = Runner.open(bundle), tmp_path / "photo.png"
    noise_images(1)[0].save(photo)
    (answer,) = runner.ask([(runner.prompter.open_pictures([photo]), QUESTION)], 12)
    assert StandIn(tmp_path / "out").answer(photo, QUESTION, 12) == answer.token_ids


def test_a_prompt_without_an_image_is_not_pruned(build_bundle: BuildBundle, tmp_path: Path) -> None:
    logits = []
    for method in ("fastervlm", "sparsevlm"):
        deploy(Bundle.open(build_bundle(MICRO, 0.25, method, self_check=False)), ROAD, tmp_path / method)
        logits.append(StandIn(tmp_path / method).logits(np.arange(5, 25)[None]))
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-4)


def test_several_prompts_at_once_are_an_error(micro_bundle: Path, tmp_path: Path) -> None:
    deploy(Bundle.open(micro_bundle), ROAD, tmp_path / "out")
    with pytest.raises(Exception, match="invalid dimensions for input: inputs_embeds"):
        StandIn(tmp_path / "out").logits(np.full((2, 9), 7))


@needs_node
@pytest.mark.parametrize(("method", "keep", "more"), CASES)
def test_transformers_js_answers_as_the_bundle_does(
    method: str, keep: float | None, more: dict[str, Any], build_bundle: BuildBundle, tmp_path: Path
) -> None:
    bundle = build_bundle(MICRO, keep, method, self_check=False, **more)
    out, pairs = tmp_path / "out", asked(tmp_path, 12)
    deploy(Bundle.open(bundle), ROAD, out)
    (out / "node_modules").symlink_to(NODE_MODULES.resolve())
    shutil.copy(Path(__file__).parent / "tokens.mjs", out)
    runner = Runner.open(bundle)
    ran = subprocess.run(
        ["node", out / "tokens.mjs", json.dumps(pairs, default=str), "12"], capture_output=True, text=True, check=True
    )
    answers = runner.ask([(runner.prompter.open_pictures([photo]), question) for photo, question in pairs], 12)
    assert json.loads(ran.stdout) == [answer.token_ids for answer in answers]


@needs_node
def test_its_script_answers(
    micro_bundle: Path, micro_runner: Runner, photo: Path, vtexport: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = vtexport("deploy", micro_bundle, "--to", "transformers.js", "out")
    assert done.code == 0
    assert "npm install --prefix out && node out/ask.mjs" in done.err
    (tmp_path / "out" / "node_modules").symlink_to(NODE_MODULES.resolve())
    command = ["node", tmp_path / "out" / "ask.mjs", photo, QUESTION]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    (answer,) = micro_runner.ask([(micro_runner.prompter.open_pictures([photo]), QUESTION)])
    assert ran.stdout == f"{answer.text}\n"


def test_sizes_that_a_checkpoint_leaves_out_are_written(micro_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(micro_bundle)
    spec, (plan,) = bundle.spec(), bundle.manifest.pruning_plans()
    write_files(bundle, plan, replace(spec, config={**spec.config, "text_config": {}}), {}, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["text_config"]
    full = spec.config["text_config"]
    assert written == {name: full[name] for name in written}
    assert {"model_type", "num_hidden_layers", "num_key_value_heads", "head_dim"} <= set(written)


def test_weights_are_split_into_files_of_a_size(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_MOST", 1_000_000)
    deploy(Bundle.open(micro_bundle), ROAD, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    chunks = config["transformers.js_config"]["use_external_data_format"]
    assert chunks["decoder_model_merged.onnx"] > 1
    expected = {
        f"{file}_data" + (f"_{number}" if number else "") for file, count in chunks.items() for number in range(count)
    }
    assert {path.name for path in (tmp_path / "out" / "onnx").iterdir()} == expected | set(chunks)
    StandIn(tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"target": "openvino"}, "was built for openvino, and transformers.js runs ONNX Runtime; build with --target"),
        ({"views": ViewChoice(images=2)}, "is of 2 images per prompt, and transformers.js's LLaVA takes one view"),
        ({"method": "sgl", "keep": 0.5}, "needs ranking besides image and prompt (method sgl)"),
        (
            {"keep": "auto", "method": "sparsevlm", "calibration": MICRO / "calibration.toml"},
            "has several plans, and transformers.js takes one; build with --keep RATIO",
        ),
    ],
)
def test_what_it_cannot_take_is_refused(
    more: dict[str, Any], message: str, build_bundle: BuildBundle, vtexport: Callable[..., Outcome], tmp_path: Path
) -> None:
    bundle = build_bundle(MICRO, **{"keep": 0.5, "self_check": False, **more})
    check_refused(vtexport("deploy", bundle, "--to", "transformers.js", "out"), message, tmp_path)


def test_a_bundle_without_a_tokenizer_file_is_refused(
    bundle_copy: Path, vtexport: Callable[..., Outcome], tmp_path: Path
) -> None:
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "processor/tokenizer.json"]
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    (bundle_copy / "processor" / "tokenizer.json").unlink()
    outcome = vtexport("deploy", bundle_copy, "--to", "transformers.js", "out")
    check_refused(outcome, "has no tokenizer.json, which transformers.js reads", tmp_path, left=["copy"])
