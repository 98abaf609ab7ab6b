"""Random traffic through the LLaVA that a bundle registers with TensorRT-LLM: no request sees what runs beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import random_checkpoint
from tests.conftest import BuildBundle, noise_images
from tests.targets.tensorrt_llm_stand_in.server import Server
from tests.targets.test_tensorrt_llm_model import Both, check, listening, registered, sent
from vtexport.models.spec import ViewChoice
from vtexport.runtime.request import Request, Result

WORDS = {"prompt": "USER: how are you today? ASSISTANT:"}
NEW_TOKENS = 6
#: questions with the marks of two images: none, first, in the middle, last
ASKED = (
    "what digit is red?",
    "<image><image>how many?",
    "is <image> the one that <image> shows?",
    "which?<image><image>",
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "own positions": ("sparsevlm", {"layers": "0,2,3", "positions": "original"}),
    "both stages": ("fastervlm+sparsevlm", {"layers": "1,2"}),
}


@dataclass(frozen=True)
class Asked:
    """Requests that are sent, and what our own bundle answers each of them."""

    both: Both
    sent: list[dict[str, Any]]
    requests: list[Request]
    expected: list[Result]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = {"num_hidden_layers": 6, "max_position_embeddings": 256}
    return random_checkpoint(tmp_path_factory.mktemp("traffic") / "model", 5, text=text)


@pytest.fixture(scope="module", params=CASES)
def asked(request: pytest.FixtureRequest, checkpoint: Path, build_bundle: BuildBundle) -> Asked:
    method, options = CASES[request.param]
    both = Both(build_bundle, checkpoint, method, 0.6, method_options=options, views=ViewChoice(images=2))
    images = noise_images(2 * len(ASKED), seed=11)
    shown = [images[2 * row : 2 * row + 2] for row in range(len(ASKED))]
    requests = both.asked(shown, ASKED)
    given_to = [sent(*pair) for pair in zip(requests, shown, strict=True)]
    return Asked(both, given_to, requests, both.answers(requests, NEW_TOKENS))


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_traffic_is_answered_as_by_our_own_graphs(asked: Asked, data: st.DataObject) -> None:
    """Arrivals, prompts without images, cancelled requests and their numbers again, blocks and batches of any size."""
    with registered(asked.both.bundle):
        server = Server(
            asked.both.folder,
            cuda_graphs=data.draw(st.booleans(), "graphs"),
            tokens_per_block=data.draw(st.sampled_from([1, 3, 8, 64]), "tokens per block"),
            max_batch_size=data.draw(st.integers(1, 6), "batch"),
            strip_after_prefill=data.draw(st.booleans(), "strip"),
        )
        alone = server.submit(WORDS, NEW_TOKENS)
        server.run()
        said, seen = server.output(alone), listening(server)
        rows: dict[int, int | None] = {}
        free: list[int] = []
        for row in data.draw(st.permutations([*range(len(ASKED)), None, None, 0]), "arrivals"):
            number = free.pop() if free and data.draw(st.booleans(), "same number") else None
            number = server.submit(WORDS if row is None else asked.sent[row], NEW_TOKENS, request_id=number)
            rows[number] = row
            for _ in range(data.draw(st.integers(0, 2), "steps")):
                server.step(data.draw(st.sampled_from([None, 0, 1, 2]), "contexts"))
            if not server.requests[number].finished and data.draw(st.integers(0, 3), "stop") == 0:
                server.cancel(number)
                free.append(number)
                del rows[number]
        server.run()
        for number, row in rows.items():
            if row is None:
                assert server.output(number) == said
            else:
                check(seen, number, server.output(number), asked.expected[row])
        assert len(server.model.schedule) == 0


def test_lengths_go_to_the_gpu_before_the_vision_stage_runs(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-LLM fills the same pinned buffers for the next step, which it prepares while this one runs."""
    with registered(asked.both.bundle):
        server = Server(asked.both.folder)
        prepared: list[list[int]] = []
        embedded = server.model._embedded

        def note(*args: Any) -> Any:
            parts = server.attn_metadata._parts
            prepared.append([part.num_tokens for part in parts])
            return embedded(*args)

        monkeypatch.setattr(server.model, "_embedded", note)
        server.submit(asked.sent[0], 1)
        server.run()
    plan, text = asked.both.runner.plan, len(asked.requests[0].prompt.token_ids)
    assert prepared == [[text + plan.per_layer[stage + 1] for stage in sorted(plan.decoder_stages)]]
