"""The LLaVA that a bundle registers with TensorRT-LLM, run by the stand-in: tokens, kept tokens, and what is refused."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import MICRO, random_checkpoint
from tests.conftest import BuildBundle, greedy, noise_images
from tests.targets.tensorrt_llm_stand_in import installed
from tests.targets.tensorrt_llm_stand_in.server import Server
from vtexport.runtime.runner import Runner

QUESTIONS = ("what digit is red?", "where is the 3 and what colour does the background have?", "how many?")
NEW = 64


@contextmanager
def registered(bundle: Path) -> Iterator[Any]:
    """TensorRT-LLM after it has imported the bundle's module, as `--custom_module_dirs` does."""
    with installed():
        sys.path.insert(0, str(bundle))
        try:
            yield importlib.import_module("vtexport_llava")
        finally:
            sys.path.remove(str(bundle))
            sys.modules.pop("vtexport_llava", None)


@pytest.fixture(scope="module")
def geometries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """micro-llava, and three random models: grouped keys, one key head per head, another depth."""
    folder = tmp_path_factory.mktemp("geometries")
    text = {"num_hidden_layers": 6, "max_position_embeddings": 512}
    return {
        "micro": MICRO,
        "grouped": random_checkpoint(folder / "grouped", 1, text={**text, "num_key_value_heads": 1}),
        "full": random_checkpoint(folder / "full", 2, text={**text, "num_key_value_heads": 4}),
        "deep": random_checkpoint(folder / "deep", 3, text={**text, "num_hidden_layers": 9}),
    }


CASES = {
    "sparsevlm": {"layers": "1,3"},
    "fastv": {},
    "pyramiddrop": {},
    "fastervlm+sparsevlm": {"layers": "1,3", "vision_keep": 0.7},
}


@pytest.mark.parametrize("geometry", ["micro", "grouped", "full", "deep"])
@pytest.mark.parametrize("method", CASES)
def test_the_staged_model_answers_as_our_own_graphs(
    geometry: str, method: str, geometries: dict[str, Path], build_bundle: BuildBundle
) -> None:
    options = {"method_options": CASES[method]}
    folder = geometries[geometry]
    runner = Runner.open(build_bundle(folder, 0.4, method, self_check=False, **options))
    pairs = list(zip(noise_images(3, seed=5), QUESTIONS, strict=True))
    requests = [runner.request(image, question) for image, question in pairs]
    expected = greedy(runner, requests, NEW)
    bundle = build_bundle(folder, 0.4, method, target="tensorrt-llm", self_check=False, **options)
    seen: dict[tuple[int, str], list[int]] = {}
    with registered(bundle):
        server = Server(folder)
        server.model.llm.model.on_stage = lambda layer, rows, dropped: [
            seen.update({(row.request, f"decoder.{layer}"): index.tolist()})
            for row, index in zip(rows, dropped.index, strict=True)
        ]
        prompts = [
            {"prompt": request.prompt.text, "multi_modal_data": {"image": [image]}}
            for request, (image, _) in zip(requests, pairs, strict=True)
        ]
        numbers = [server.submit(prompt, NEW) for prompt in prompts]
        server.run()
        outputs = [server.output(number) for number in numbers]
    for number, output, result in zip(numbers, outputs, expected, strict=True):
        for where, kept in result.kept.items():
            if where != "vision":
                assert seen[number, where] == kept.tolist(), where
        assert output == result.token_ids
