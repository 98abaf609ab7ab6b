"""What runs in Triton's Python backend, on a stand-in for Triton: batches, pieces, errors and clients that go away."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import noise_images
from tests.deploy import triton_stand_in as triton
from tests.deploy.triton_stand_in import Request, Sender
from vtexport.deploy.triton import backend
from vtexport.deploy.triton.backend import Answering
from vtexport.errors import InputError
from vtexport.runtime.runner import Runner

IMAGES = noise_images(3)
QUESTIONS = ("what digit is red?", "where is the 3?", "how many digits are there?")
PAIRS = list(zip(IMAGES, QUESTIONS, strict=True))


def png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def texts(*values: bytes | str) -> Any:
    return np.array([[value.encode() if isinstance(value, str) else value for value in values]], dtype=np.object_)


def request(image: Any, question: str | list[Any] | None, count: int | None = None, **more: Any) -> Request:
    """A request; `more` are further inputs, and `sender`."""
    sender, inputs = more.pop("sender", None) or Sender(), {"IMAGE": texts(png(image))}
    if isinstance(question, str):
        inputs["PROMPT"] = texts(question)
    elif question is not None:
        inputs["MESSAGES"] = texts(json.dumps(question))
    if count is not None:
        inputs["MAX_NEW_TOKENS"] = np.array([[count]], dtype=np.int32)
    return Request({**inputs, **more}, sender)


def opened(bundle: Path, **args: str) -> Answering:
    """A model that was initialised with `args` besides those of a CPU."""

    class Model(Answering):
        pass

    Model.bundle = bundle
    model = Model()
    parameters = {"threads": {"string_value": "1"}}
    model.initialize({"model_instance_kind": "CPU", "model_config": json.dumps({"parameters": parameters}), **args})
    return model


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    triton.logged.clear()
    yield
    triton.logged.clear()


@pytest.fixture
def model(micro_bundle: Path) -> Answering:
    return opened(micro_bundle)


def test_requests_together_get_the_answers_that_each_gets_alone(model: Answering, micro_runner: Runner) -> None:
    requests = [request(*pair) for pair in PAIRS]
    model.execute(requests)
    for one, answer in zip(requests, micro_runner.ask(PAIRS), strict=True):
        assert one.joined() == (answer.text, answer.token_ids)
        assert one.last["FINISH_REASON"][0] == b"stop"
        assert one.last["VISUAL_TOKENS"][0] == pytest.approx(answer.visual_tokens["mean"])
    assert not triton.logged


def test_an_answer_comes_in_pieces_or_at_once(model: Answering, micro_runner: Runner) -> None:
    (answer,) = micro_runner.ask(PAIRS[1:2])
    pieces = [piece for piece in micro_runner.stream(*PAIRS[1]) if piece]
    assert len(pieces) > 1
    one, whole = request(*PAIRS[1]), request(*PAIRS[1], STREAM=np.array([[False]]))
    model.execute([one, whole])
    said = [response.outputs["TEXT"][0].decode() for response in one.sender.responses]
    assert [piece for piece in said if piece] == pieces
    assert one.joined() == whole.joined() == (answer.text, answer.token_ids)
    assert len(whole.sender.responses) == 1


def test_every_request_has_its_own_limit(model: Answering, micro_runner: Runner) -> None:
    requests = [request(*PAIRS[1], count=count) for count in (1, 64, 2)]
    model.execute(requests)
    (answer,) = micro_runner.ask(PAIRS[1:2])
    assert len(answer.token_ids) > 2
    assert [one.joined()[1] for one in requests] == [answer.token_ids[:count] for count in (1, 64, 2)]
    assert [one.last["FINISH_REASON"][0] for one in requests] == [b"length", b"stop", b"length"]


def test_decoding_ends_with_the_last_answer(model: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the limit of a request whose client is gone."""
    steps: list[int] = []
    decode = model._runner.engine.decode
    monkeypatch.setattr(model._runner.engine, "decode", lambda *given: steps.append(1) or decode(*given))
    requests = [request(*PAIRS[0], sender=Sender(leaves_after=1)), request(*PAIRS[1], count=2)]
    model.execute(requests)
    assert all(one.sender.closed for one in requests)
    assert len(steps) <= 2


def test_a_conversation_and_a_data_url(model: Answering, micro_runner: Runner) -> None:
    messages = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": [{"type": "text", "text": QUESTIONS[1]}]},
    ]
    url = b"data:image/png;base64," + base64.b64encode(png(IMAGES[0]))
    one = request(IMAGES[0], messages, IMAGE=texts(url))
    model.execute([one])
    (answer,) = micro_runner.ask([(IMAGES[0], messages)])
    assert one.joined() == (answer.text, answer.token_ids)


BAD = {
    "give one of them": request(IMAGES[0], None),
    "PROMPT, a question, or MESSAGES": request(IMAGES[0], QUESTIONS[0], MESSAGES=texts("[]")),
    "the prompt is empty": request(IMAGES[0], "  "),
    "MAX_NEW_TOKENS is 0; give 1 or more": request(*PAIRS[0], count=0),
    "IMAGE 1 is not a readable image": request(*PAIRS[0], IMAGE=texts(b"\x89PNG and no more")),
    "or a base64 data URL": request(*PAIRS[0], IMAGE=texts(b"data:image/png;base64,%%%")),
    "MESSAGES is not JSON": request(*PAIRS[0][:1], None, MESSAGES=texts("[{")),
    "MESSAGES holds no list": request(*PAIRS[0][:1], None, MESSAGES=texts("{}")),
    "PROMPT is not UTF-8": request(*PAIRS[0], PROMPT=texts(b"\xff")),
    "end with a question of the user": request(IMAGES[0], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    "PROMPT has 2 rows; send a request for each question": request(*PAIRS[0], PROMPT=np.repeat(texts("a"), 2, axis=0)),
    "the prompt has 2 <image> marks": request(IMAGES[0], "<image> <image> what?"),
    "exceed the model's": request(*PAIRS[0], count=100_000),
}  # fmt: skip


def test_bad_requests_are_refused_in_one_line_and_the_others_are_answered(
    model: Answering, micro_runner: Runner
) -> None:
    good = request(*PAIRS[1])
    model.execute([*BAD.values(), good])
    for message, bad in BAD.items():
        assert message in bad.error.message
        assert bad.error.code == triton.TritonError.INVALID_ARG
        assert len(bad.error.message.splitlines()) == 1
    (answer,) = micro_runner.ask(PAIRS[1:2])
    assert good.joined() == (answer.text, answer.token_ids)
    assert not triton.logged


def test_what_is_too_much_only_together_is_answered_one_by_one(
    model: Answering, micro_runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def admit(rows: int, text: int, new_tokens: int) -> None:
        batches.append(rows)
        if rows > 1:
            raise InputError("too many; ask fewer")

    monkeypatch.setattr(model._runner.engine, "admit", admit)
    requests = [request(*pair) for pair in PAIRS]
    model.execute(requests)
    assert batches[0] == 3
    assert set(batches[1:]) == {1}
    assert [one.joined()[0] for one in requests] == [answer.text for answer in micro_runner.ask(PAIRS)]


def test_the_server_survives_an_error_of_its_own(model: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(backend, "Generation", lambda *_, **__: 1 / 0)
        requests = [request(*pair) for pair in PAIRS]
        model.execute(requests)
    for one in requests:
        assert one.error.message == "ZeroDivisionError: division by zero"
        assert one.error.code == triton.TritonError.INTERNAL
    assert triton.logged == ["ZeroDivisionError: division by zero"] * 3
    again = request(*PAIRS[0])
    model.execute([again])
    assert again.joined()[0]


def test_an_error_in_the_middle_ends_what_has_begun(model: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise InputError("no more; ask less")

    monkeypatch.setattr(model._runner.engine, "decode", refuse)
    requests = [request(*PAIRS[1]), request(*PAIRS[1], STREAM=np.array([[False]]))]
    model.execute(requests)
    for one in requests:
        assert one.sender.closed
        last = one.sender.responses[-1].error
        assert last is not None
        assert last.message == "no more; ask less"
    # What was not begun has been tried again alone.
    assert [len(one.sender.responses) for one in requests] == [2, 1]


def test_a_client_that_goes_away_is_no_longer_answered(model: Answering, micro_runner: Runner) -> None:
    gone, stays = request(*PAIRS[1], sender=Sender(leaves_after=1)), request(*PAIRS[1])
    model.execute([gone, stays])
    assert gone.sender.closed
    assert len(gone.sender.responses) == 1
    assert stays.joined()[0] == micro_runner.ask(PAIRS[1:2])[0].text


def test_every_image_gets_its_own_plan(adaptive_bundle: Path) -> None:
    model, runner = opened(adaptive_bundle), Runner.open(adaptive_bundle)
    requests = [request(*pair) for pair in PAIRS]
    model.execute(requests)
    for one, answer in zip(requests, runner.ask(PAIRS), strict=True):
        assert one.joined() == (answer.text, answer.token_ids)
        assert one.last["VISUAL_TOKENS"][0] == pytest.approx(answer.visual_tokens["mean"])


def test_an_instance_works_on_its_own_gpu(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    opened(micro_bundle, model_instance_kind="GPU", model_instance_device_id="1")
    assert chosen == [1]
    opened(micro_bundle)
    assert chosen == [1]


def test_a_bundle_that_cannot_be_opened_is_not_ready(bundle_copy: Path) -> None:
    (bundle_copy / "engine" / "vision.onnx").unlink()
    with pytest.raises(Exception, match=r"vision.onnx is missing; build the bundle again"):
        opened(bundle_copy)
