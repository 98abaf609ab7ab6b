"""Conversations of several turns: what becomes of their messages, and what a bundle answers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import MICRO, family_checkpoint, random_clip
from tests.conftest import BuildBundle, check_refused, noise_images
from tests.test_vision_cache import counted
from vtexport.errors import InputError
from vtexport.models import read_spec
from vtexport.models.conversation import asked
from vtexport.models.prompt import Prompter
from vtexport.models.spec import ViewChoice
from vtexport.models.template import ChatTemplate
from vtexport.runtime.runner import Runner
from vtexport.targets.tensorrt_llm import messages, prompts, reached

FIRST, ANSWER, SECOND = "what digit is red?", "7", "where is the 3?"
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": FIRST}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


CONVERSATION = [user(FIRST), assistant(ANSWER), user(SECOND)]

# Templates as LLaVA checkpoints of the hub have them: parts only, in which a text would be lost without a word.
LLAVA_15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>' + message['content'][0]['text'] + '<</SYS>>' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
TEXTS_ONLY = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + ' ' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return Prompter(MICRO, read_spec(MICRO))


# Prompts


@pytest.mark.parametrize("question", [FIRST, f"<image>\n{FIRST}", "in this <image> what digit is red?"])
def test_a_question_is_the_conversation_of_one_turn(prompter: Prompter, question: str) -> None:
    assert prompter.prompt([user(question)]) == prompter.prompt(question)
    assert prompter.prompt([user([{"type": "text", "text": question}])]) == prompter.prompt(question)


@pytest.mark.parametrize(
    "first", [FIRST, [TEXT], [IMAGE, TEXT], [{"type": "image_url", "image_url": {"url": "…"}}, TEXT]]
)
@pytest.mark.parametrize("before", [[], [system("answer briefly")]])
def test_prompts_are_the_processors_own(prompter: Prompter, before: list[Any], first: Any) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(MICRO)
    theirs = [*before, user([IMAGE, TEXT]), assistant([{"type": "text", "text": ANSWER}]), user(SECOND)]
    text = processor.apply_chat_template(theirs, add_generation_prompt=True)
    prompt = prompter.prompt([*before, user(first), assistant(ANSWER), user(SECOND)])
    assert prompt.text == text
    assert text.endswith("USER: <image>\nwhat digit is red? ASSISTANT: 7 USER: where is the 3? ASSISTANT:")
    image = noise_images(1)[0]
    ids, at = list(prompt.token_ids), prompt.image_positions[0]
    expected = processor(images=image, text=text, return_tensors="np")["input_ids"][0]
    assert [*ids[:at], *[4] * 144, *ids[at:]] == expected.tolist()


def test_images_stand_where_they_are_marked(prompter: Prompter) -> None:
    for second in ([IMAGE, {"type": "text", "text": SECOND}], f"<image>\n{SECOND}"):
        text = prompter.prompt([user(FIRST), assistant(ANSWER), user(second)]).text
        assert text == "USER: what digit is red? ASSISTANT: 7 USER: <image>\nwhere is the 3? ASSISTANT:"


def test_several_images_stand_in_the_turns_that_mark_them() -> None:
    two = Prompter(MICRO, read_spec(MICRO, ViewChoice(images=2)))
    together = two.prompt(CONVERSATION)
    assert together.text.startswith("USER: <image>\n<image>\nwhat digit")
    apart = two.prompt([user([IMAGE, TEXT]), assistant(ANSWER), user([IMAGE, {"type": "text", "text": SECOND}])])
    assert apart.text == "USER: <image>\nwhat digit is red? ASSISTANT: 7 USER: <image>\nwhere is the 3? ASSISTANT:"
    assert apart.image_positions[0] == together.image_positions[0]
    assert apart.num_after < together.num_after
    with pytest.raises(InputError, match="the messages have 1 image parts or marks, this model was built for 2"):
        two.prompt([user([IMAGE, TEXT])])


def test_videos_are_parts_of_their_own_type(tmp_path: Path) -> None:
    folder = family_checkpoint(tmp_path, "video_llava")
    prompter = Prompter(folder, read_spec(folder))
    marked = prompter.prompt([user([{"type": "video"}, TEXT]), assistant(ANSWER), user(SECOND)])
    assert marked == prompter.prompt(CONVERSATION)
    with pytest.raises(InputError, match=r'part 1 of message 1 has type \'image\'; give .* or {"type": "video"}'):
        prompter.prompt([user([IMAGE, TEXT])])


@pytest.mark.parametrize(
    ("template", "question", "text"),
    [
        (LLAVA_15, CONVERSATION, f"USER: <image>\n{FIRST} ASSISTANT: {ANSWER} USER: {SECOND} ASSISTANT:"),
        (LLAVA_15, f"<image>\n{FIRST}", f"USER: <image>\n{FIRST} ASSISTANT:"),
        (MISTRAL, CONVERSATION, f"[INST] <image>\n{FIRST} [/INST] {ANSWER}</s> [INST] {SECOND} [/INST]"),
        (
            MISTRAL,
            [system("be brief"), user(f"in <image>, {FIRST}")],
            f"<<SYS>>be brief<</SYS>>[INST] in <image>, {FIRST} [/INST]",
        ),
        (TEXTS_ONLY, [user(f"<image> {FIRST}"), assistant("7"), user("why?")], f"user: <image> {FIRST} assistant: 7 user: why? "),
    ],
)  # fmt: skip
def test_templates_of_every_form(monkeypatch: pytest.MonkeyPatch, template: str, question: Any, text: str) -> None:
    prompter = Prompter(MICRO, read_spec(MICRO))
    monkeypatch.setattr(prompter, "_template", ChatTemplate(template))
    assert prompter.prompt(question).text == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEXTS_ONLY, r"the chat template refuses the prompt \(no system role\); give messages that it takes"),
        ("{{ messages[-1].content[0].text }}", "the chat template leaves out message 1, of role system; put its text into"),
    ],
)  # fmt: skip
def test_templates_that_leave_out_the_system(monkeypatch: pytest.MonkeyPatch, template: str, message: str) -> None:
    prompter = Prompter(MICRO, read_spec(MICRO))
    monkeypatch.setattr(prompter, "_template", ChatTemplate(template))
    with pytest.raises(InputError, match=message):
        prompter.prompt([system("be brief"), user(f"<image> {FIRST}")])


def test_templates_of_texts_want_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    prompter = Prompter(MICRO, read_spec(MICRO))
    monkeypatch.setattr(prompter, "_template", ChatTemplate(TEXTS_ONLY))
    with pytest.raises(InputError, match=r"the chat template takes texts alone \(.*\); mark images in the text"):
        prompter.prompt(FIRST)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the conversation has no messages; give a list of messages such as"),
        ({"messages": CONVERSATION}, "a conversation is a list of messages, not dict; give a list"),
        (None, "a conversation is a list of messages, not NoneType"),
        (b"what?", "a conversation is a list of messages, not bytes"),
        (["what?"], "message 1 is of type str, not an object with role and content"),
        ([{"content": FIRST}], "message 1 has role None; give system, user or assistant"),
        ([{"role": "tool", "content": FIRST}], "message 1 has role 'tool'; give system, user or assistant"),
        ([user("")], "message 1 is empty; give its text, or leave it out"),
        ([user(FIRST), assistant(" "), user(SECOND)], "message 2 is empty"),
        ([user([IMAGE])], "message 1 is empty"),
        ([user([])], "message 1 is empty"),
        ([{"role": "user"}], "message 1 has content of type NoneType; give text or a list of parts"),
        ([user(FIRST), assistant(ANSWER)], "the last message has role assistant; end with a question of the user"),
        ([system(FIRST)], "the last message has role system; end with a question of the user"),
        ([user(FIRST), user(SECOND)], "message 2 has role user where assistant is due; give user and assistant in turns"),
        ([assistant(ANSWER), user(SECOND)], "message 1 has role assistant where user is due"),
        ([user(FIRST), system(ANSWER), user(SECOND)], "message 2 has role system where assistant is due"),
        ([system("a"), system("b"), user(SECOND)], "message 2 has role system where user is due"),
        ([user([{"type": "audio"}, TEXT])], "part 1 of message 1 has type 'audio'; give"),
        ([user(["what?"])], "part 1 of message 1 has type None; give"),
        ([user([IMAGE, {"type": "text"}])], 'part 2 of message 1 of type text has no "text"; give'),
        ([user([IMAGE, IMAGE, TEXT])], "the messages have 2 image parts or marks, this model was built for 1 per prompt"),
        ([user([IMAGE, TEXT]), assistant("7"), user("<image>?!")], "the messages have 2 image parts or marks"),
        ([user(FIRST), assistant("<image> 7"), user(SECOND)], "message 2 is of role assistant but has image parts or marks"),
        ([system([IMAGE, TEXT]), user(SECOND)], "message 1 is of role system but has image parts or marks"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(prompter: Prompter, given: Any, message: str) -> None:
    with pytest.raises(InputError) as refused:
        prompter.prompt(given)
    assert str(refused.value).startswith(message)
    assert len(str(refused.value).splitlines()) == 1


# Answers


def test_a_conversation_is_answered_like_its_own_prompt(micro_runner: Runner) -> None:
    image = noise_images(1)[0]
    single, one_turn, second = micro_runner.ask([(image, FIRST), (image, [user(FIRST)]), (image, CONVERSATION)], 6)
    assert (one_turn.token_ids, one_turn.stages) == (single.token_ids, single.stages)
    # The method chooses by the image alone.
    assert second.stages == single.stages
    assert "".join(micro_runner.stream(image, CONVERSATION, 6)) == second.text
    with pytest.raises(InputError, match="the last message has role assistant"):
        micro_runner.ask([(image, CONVERSATION[:2])], 6)


def test_prompts_that_grow_too_long_are_refused(micro_runner: Runner) -> None:
    long = [user("what digit is red? " * 400), *CONVERSATION[1:]]
    with pytest.raises(InputError, match="exceed the model's 2048 positions; shorten the prompt"):
        micro_runner.ask([(noise_images(1)[0], long)], 6)


def test_a_second_turn_skips_the_vision_tower(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner.open(micro_bundle)
    seen, image = counted(runner, monkeypatch), noise_images(1)[0]
    answer = runner.ask([(image, FIRST)], 6)[0]
    runner.ask([(image, [user(FIRST), assistant(answer.text or ANSWER), user(SECOND)])], 6)
    assert seen == [1]


def test_all_text_behind_the_image_rates(build_bundle: BuildBundle) -> None:
    """Raters are sought in every turn behind the last image, and in none before it."""
    runner = Runner.open(build_bundle(MICRO, 0.25, "sparsevlm", debug=True, self_check=False))
    behind = [user(FIRST), assistant("7"), user(SECOND)]
    before = [user(FIRST), assistant("7"), user(f"<image>\n{SECOND}")]
    requests = [runner.request(noise_images(1)[0], question) for question in (behind, before)]
    results, _ = runner.generate(requests, runner.decoding(1))
    words = runner.prompter.tokenizer
    rating = []
    for request, result in zip(requests, results, strict=True):
        places = np.flatnonzero(result.debug["raters"][: len(request.prompt.token_ids)])
        assert places.min() >= request.prompt.image_positions[0]
        rating.append(words.decode([request.prompt.token_ids[place] for place in places]))
    # Only the first question has this word.
    assert "what" in rating[0]
    assert "what" not in rating[1]
    assert all("3" in text for text in rating)


def test_a_method_that_reads_the_question_gets_the_last_one(build_bundle: BuildBundle, tmp_path: Path) -> None:
    clip = random_clip(tmp_path / "clip", 5, read_spec(MICRO).vision.hidden_size)
    runner = Runner.open(
        build_bundle(MICRO, 0.25, "cdpruner", method_options={"clip": str(clip)}, self_check=False)
    )  # fmt: skip
    image = noise_images(1)[0]
    single, last, other = (runner.request(image, question).extras["question_ids"] for question in (
        FIRST, [user(SECOND), assistant(ANSWER), user([TEXT])], CONVERSATION,
    ))  # fmt: skip
    assert single.tolist() == last.tolist() != other.tolist()
    assert asked(CONVERSATION) == SECOND


# TensorRT-LLM


def test_prompts_for_tensorrt_llm(build_bundle: BuildBundle) -> None:
    runner, image = Runner.open(build_bundle(MICRO, 0.5, "fastervlm", self_check=False)), noise_images(1)[0]
    (given,) = prompts(runner, [(image, CONVERSATION)])
    assert given["prompt"] == runner.prompter.prompt(CONVERSATION).text
    assert [len(tensor) for tensor in given["multi_modal_embeddings"]["image"]] == [72]
    text = len(runner.prompter.prompt(CONVERSATION).token_ids)
    assert reached(runner, CONVERSATION, text + 72) == 72


@pytest.mark.parametrize("turn", [0, 2])
def test_messages_for_its_server_carry_images_in_their_turn(build_bundle: BuildBundle, turn: int) -> None:
    runner = Runner.open(build_bundle(MICRO, 0.5, "fastervlm", self_check=False))
    given = [dict(message) for message in CONVERSATION]
    texts = [message["content"] for message in given]
    if turn:
        given[turn]["content"] = f"<image>\n{SECOND}"
    (sent,) = messages(runner, [(noise_images(1)[0], given)])
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    image, text = sent[turn].pop("content")
    assert (image["type"], text) == ("image_embeds", {"type": "text", "text": texts[turn]})
    assert [message.get("content") for message in sent] == [None if n == turn else texts[n] for n in range(3)]
    given[turn]["content"] = [TEXT, IMAGE]
    with pytest.raises(InputError, match="has a <image> mark behind text"):
        messages(runner, [(noise_images(1)[0], given)])


# The command line


def test_run_takes_messages(vtexport, micro_bundle: Path, photo: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "one.json").write_text(json.dumps([user(FIRST)]))
    asked_alone = vtexport("run", micro_bundle, "--image", photo, "--prompt", FIRST)
    one = vtexport("run", micro_bundle, "--image", photo, "--messages", "one.json")
    assert (one.code, one.out) == (0, asked_alone.out)
    text = json.dumps(CONVERSATION)
    (tmp_path / "two.json").write_text(text)
    two = vtexport("run", micro_bundle, "--image", photo, "--messages", "two.json", "--json", "--max-new-tokens", "4")
    (line,) = map(json.loads, two.out.splitlines())
    assert 1 <= len(line["token_ids"]) <= 4
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    piped = vtexport("run", micro_bundle, "--image", photo, "--messages", "-", "--json", "--max-new-tokens", "4")
    assert json.loads(piped.out)["token_ids"] == line["token_ids"]


def test_bad_messages(vtexport, micro_bundle: Path, photo: Path, tmp_path: Path) -> None:
    files = {
        "good.json": json.dumps(CONVERSATION),
        "unended.json": json.dumps(CONVERSATION[:2]),
        "request.json": json.dumps({"messages": CONVERSATION}),
        "broken.json": "[{",
        "deep.json": "[" * 100_000,
        "binary.json": "\xff\xfe",
        "text.json": '"what digit is red?"',
    }
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    for arguments, message in (
        (["--messages", "good.json"], "0 --image given, this bundle was built for 1 per prompt"),
        (["--image", photo, "--image", photo, "--messages", "good.json"], "2 --image given"),
        (
            ["--image", photo, "--messages", "good.json", "--prompt", "what?"],
            "--messages has no effect beside --prompt",
        ),
        (["--image", photo, "--messages", "nowhere.json"], "nowhere.json: No such file or directory; check the path"),
        (["--image", photo, "--messages", tmp_path], "Is a directory; check the path given with --messages"),
        (["--image", photo, "--messages", "broken.json"], "broken.json is not JSON (Input data was truncated"),
        (["--image", photo, "--messages", "deep.json"], "deep.json is not JSON"),
        (["--image", photo, "--messages", "binary.json"], "binary.json is not JSON"),
        (["--image", photo, "--messages", "text.json"], "text.json holds no list of messages"),
        (["--image", photo, "--messages", "request.json"], "request.json holds no list of messages"),
        (["--image", photo, "--messages", "unended.json"], "the last message has role assistant; end with a question"),
    ):
        check_refused(vtexport("run", micro_bundle, *arguments), message, tmp_path, list(files))
