"""A bundle as a model of lmms-eval: against stand-ins for what it uses of lmms-eval, or against that if it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.conftest import BuildBundle
from vtexport.errors import InputError
from vtexport.micro import heldout
from vtexport.runtime.runner import Runner

ROOT = Path(__file__).parents[1]
EXAMPLES = list(heldout.examples(5))


@dataclass
class StandInInstance:
    args: tuple[Any, ...]
    task_name: str = "micro"


class StandInModel:
    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@dataclass
class StandInManifest:
    model_id: str
    chat_class_path: str


class StandInMessages:
    """As pydantic makes them: messages and their content as objects."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.messages = [
            SimpleNamespace(role=one["role"], content=[SimpleNamespace(**part) for part in one["content"]])
            for one in messages
        ]

    def extract_media(self) -> tuple[list[Any], list[Any], list[Any]]:
        parts = [part for message in self.messages for part in message.content]
        images, videos, audios = ([p.url for p in parts if p.type == kind] for kind in ("image", "video", "audio"))
        return images, videos, audios


@pytest.fixture
def lmms(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, and in its `logged` what it reports."""
    if importlib.util.find_spec("lmms_eval") is None:
        members: dict[str, dict[str, object]] = {
            "lmms_eval.api.instance": {"Instance": StandInInstance},
            "lmms_eval.api.model": {"lmms": StandInModel},
            "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": None},
            "lmms_eval.models.registry_v2": {"ModelManifest": StandInManifest},
            "lmms_eval.protocol": {"ChatMessages": StandInMessages},
        }
        for name in members:
            parts = name.split(".")
            for end in range(1, len(parts)):
                monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        for name, values in members.items():
            module = ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "vtexport.measure.lmms", raising=False)
    found = importlib.import_module("vtexport.measure.lmms")
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(found, "log_metrics", lambda **values: logged.append(values))
    monkeypatch.setattr(found, "logged", logged, raising=False)
    yield found
    sys.modules.pop("vtexport.measure.lmms", None)


def messages(document: Any) -> list[dict[str, Any]]:
    """What lmms-eval makes of a task with images and a text."""
    parts = [{"type": "image", "url": image} for image in document["images"]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": document["question"]}]}]


def opened(lmms: ModuleType, bundle: Path, documents: list[dict[str, Any]] | None = None, **more: Any) -> Any:
    model = lmms.BundleModel(bundle=str(bundle), **more)
    if documents is None:
        documents = [{"images": [Image.fromarray(e.image)], "question": e.question.text} for e in EXAMPLES]
    model.task_dict = {"micro": {"test": documents}}
    return model


def requests(count: int, options: dict[str, Any] | None = None) -> list[Any]:
    return [
        SimpleNamespace(
            args=("", messages, options or {"max_new_tokens": 6}, number, "micro", "test"), task_name="micro"
        )
        for number in range(count)
    ]


def test_the_entry_point_names_the_class(lmms: ModuleType) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    assert declared == {"vtexport": "vtexport.measure.lmms:manifest"}
    found = lmms.manifest()
    module, _, name = found.chat_class_path.rpartition(".")
    assert found.model_id == "vtexport"
    assert getattr(importlib.import_module(module), name) is lmms.BundleModel
    assert lmms.BundleModel.is_simple is False


def test_answers_are_the_runners(lmms: ModuleType, micro_bundle: Path, micro_runner: Runner) -> None:
    pairs = [(Image.fromarray(example.image), example.question.text) for example in EXAMPLES]
    expected = [answer.text for answer in micro_runner.ask(pairs, 6)]
    for size in (1, 2, "4"):
        assert opened(lmms, micro_bundle, batch_size=size).generate_until(requests(5)) == expected
    report = lmms.logged[-1]
    assert report["total_gen_tokens"] > 5
    assert report["avg_speed"] == pytest.approx(report["total_gen_tokens"] / report["total_elapsed_time"])
    more = report["additional_metrics"]
    assert (more["num_requests"], more["mean_visual_tokens"]) == (5, 36)
    assert 0 < more["per_token_ms"] < more["first_token_ms"]


def test_images_may_come_as_paths(lmms: ModuleType, micro_bundle: Path, photo: Path) -> None:
    question = EXAMPLES[0].question.text
    documents = [{"images": [image], "question": question} for image in (str(photo), Image.open(photo))]
    first, second = opened(lmms, micro_bundle, documents).generate_until(requests(2))
    assert first == second
    missing = opened(lmms, micro_bundle, [{"images": ["nowhere.png"], "question": question}])
    with pytest.raises(InputError, match="no such image"):
        missing.generate_until(requests(1))


def test_requests_with_other_options_are_not_in_the_same_batch(lmms: ModuleType, micro_bundle: Path) -> None:
    asked = [*requests(2), *requests(5, {"max_new_tokens": 1})[2:]]
    assert [len(batch) for batch in lmms._batches(asked, 4)] == [2, 3]
    assert [len(batch) for batch in lmms._batches(asked, 2)] == [2, 2, 1]
    assert list(lmms._batches([], 2)) == []
    answers = opened(lmms, micro_bundle, batch_size=4).generate_until(asked)
    assert all(len(answer.split()) == 1 for answer in answers[2:])


@pytest.mark.parametrize(
    ("until", "text"),
    [(None, "a. b\n\nc"), ([], "a. b\n\nc"), (["\n\n"], "a. b"), (["\n\n", "."], "a"), (".", "a"), ([""], "a. b\n\nc")],
)
def test_answers_end_at_the_first_stop_text(lmms: ModuleType, until: Any, text: str) -> None:
    assert lmms._cut("a. b\n\nc ", until) == text


def test_what_a_bundle_cannot_do_is_refused(
    lmms: ModuleType, micro_bundle: Path, build_bundle: BuildBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, message in (
        ({"bundle": ""}, "no bundle is given"),
        ({"bundle": micro_bundle, "pretrained": "x"}, "pretrained has no effect on a bundle"),
        ({"bundle": micro_bundle, "device": "cuda:0"}, "device has no effect on a bundle"),
        ({"bundle": micro_bundle, "batch_size": "auto"}, "--batch_size auto is no number of prompts"),
        ({"bundle": micro_bundle, "batch_size": 0}, "--batch_size 0 is no number of prompts"),
        ({"bundle": micro_bundle, "threads": "many"}, "threads=many is no number of threads"),
        ({"bundle": micro_bundle, "ranking_from": micro_bundle}, "has no effect with method fastervlm"),
    ):
        with pytest.raises(InputError, match=message):
            lmms.BundleModel(**arguments)
    assert lmms.BundleModel(bundle=micro_bundle, device=None).runner.plan.method == "fastervlm"
    model = opened(lmms, micro_bundle)
    for options in ({"temperature": 0.7}, {"do_sample": True}, {"num_beams": 4}):
        with pytest.raises(InputError, match="but a bundle decodes greedily"):
            model.generate_until(requests(1, options))
    greedy = {"temperature": 0.0, "do_sample": False, "num_beams": 1, "top_p": 1.0, "until": ["\n\n"]}
    assert len(model.generate_until(requests(1, greedy))) == 1
    with pytest.raises(InputError, match="scores likelihoods"):
        model.loglikelihood(requests(1))
    with pytest.raises(InputError, match="asks in rounds"):
        model.generate_until_multi_round(requests(1))
    none = opened(lmms, micro_bundle, [{"images": [], "question": "what?"}])
    with pytest.raises(InputError, match="document 0 has 0 images, but the bundle takes 1"):
        none.generate_until(requests(1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="answers in one process"):
        opened(lmms, micro_bundle)


def test_tasks_without_messages_are_refused(lmms: ModuleType, micro_bundle: Path) -> None:
    """lmms-eval gives such requests for a task whose path stands in place of its name."""
    request = SimpleNamespace(args=("what?", {}, lambda _document: [], 0, "micro", "test"), task_name="micro")
    with pytest.raises(InputError, match="task micro comes without messages"):
        opened(lmms, micro_bundle).generate_until([request])


def test_videos_are_refused(lmms: ModuleType, micro_bundle: Path) -> None:
    model = opened(lmms, micro_bundle, [{}])
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "what?"}]}]
    request = SimpleNamespace(args=("", lambda _document: video, {}, 0, "micro", "test"), task_name="micro")
    with pytest.raises(InputError, match="document 0 has a video or sound"):
        model.generate_until([request])
