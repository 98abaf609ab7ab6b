"""Asks TensorRT-LLM's server and judges what it answers; `benchmarks/tensorrt_llm.sh` calls every command here.

    python benchmarks/tensorrt_llm_client.py check BUNDLE URL --report FILE [--against BUNDLE] [--embeddings] [--held-out]
    python benchmarks/tensorrt_llm_client.py latency URL --json FILE
    python benchmarks/tensorrt_llm_client.py table DENSE.json PRUNED.json
    python benchmarks/tensorrt_llm_client.py wait URL PID SECONDS [--message TEXT --log FILE]
    python benchmarks/tensorrt_llm_client.py older CHECKPOINT FOLDER

It runs in the Python that has all of vtexport. `check` prints a line for each thing that it looked at: PASS, FAIL or SKIP.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tensorrt_llm_http import Reply, ServerError, ask, ask_streaming, healthy, image_part

if TYPE_CHECKING:
    from vtexport import Runner

MAX_TOKENS, PAIRS = 64, 4
#: of latency: tokens per answer, requests of a round, and requests before the first round
TOKENS, REQUESTS, WARM_UP = 32, 8, 3
QUESTIONS = ("What is shown in this image?", "Which colours do you see?", "Describe the image in one short sentence.")
Messages = list[dict[str, Any]]


def said(verdict: str, what: str, why: str = "") -> None:
    """Print a line of the script."""
    print(f"{verdict} {what}: {why}" if why else f"{verdict} {what}", flush=True)


def photo(number: int, size: tuple[int, int] = (640, 480)) -> Any:
    """The picture `number` of smooth noise, made as `vtexport.measure.samples.sample_photo` makes its one."""
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng([20, number]).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def pairs_to_ask(count: int, held_out: bool) -> list[tuple[Any, str]]:
    """Images and questions: micro-llava's held-out ones, or pictures made here."""
    if not held_out:
        return [(photo(number), QUESTIONS[number % len(QUESTIONS)]) for number in range(count)]
    from PIL import Image

    from vtexport.micro import heldout

    return [(Image.fromarray(one.image), one.question.text) for one in heldout.examples(count)]


def conversations(runner: Runner, pairs: Sequence[tuple[Any, str]], embeddings: bool) -> list[Messages]:
    """Messages about images, which go as PNG files, or as embeddings made by the bundle."""
    if embeddings:
        from vtexport.targets.tensorrt_llm import messages

        return messages(runner, pairs)
    return [
        [{"role": "user", "content": [image_part(image), {"type": "text", "text": question}]}]
        for image, question in pairs
    ]


def check(arguments: argparse.Namespace) -> None:
    """Ask all questions, alone and two at a time, and judge answers, counts and the report."""
    from vtexport import Runner

    runner, name = Runner.open(arguments.bundle), arguments.name
    pairs = pairs_to_ask(arguments.questions, arguments.held_out)
    asked = conversations(runner, pairs, arguments.embeddings)
    before = len(report_lines(arguments.report))
    try:
        replies = [ask(arguments.url, messages, MAX_TOKENS) for messages in asked]
    except ServerError as error:
        if arguments.embeddings and "image_embeds" in str(error):
            said("SKIP", name, f"this server takes no parts of type image_embeds ({error})")
        else:
            said("FAIL", f"{name}: answers", str(error))
        return
    texts = [len(runner.prompter.prompt(question).token_ids) for _, question in pairs]
    check_answers(name, replies, pairs, arguments.against)
    check_counts(name, runner, replies, texts)
    check_together(name, arguments.url, asked, replies)
    # What was asked two at a time is reported as well.
    together = 2 * min(PAIRS, len(texts) // 2)
    check_report(name, runner, arguments.report, before, texts + texts[:together])


def check_answers(name: str, replies: Sequence[Reply], pairs: Sequence[tuple[Any, str]], against: Path | None) -> None:
    """Compare answers with those of `vtexport run` of another bundle of the same plan."""
    from vtexport import Runner

    what = f"{name}: answers as onnxruntime's"
    if against is None:
        said("SKIP", what, "the checkpoint is too large for an onnxruntime bundle in fp32")
        return
    expected = [answer.text for answer in Runner.open(against).ask(pairs, MAX_TOKENS)]
    differing = [
        f"{question!r} (number {number}) was answered {reply.text!r} in place of {text!r}"
        for number, ((_, question), reply, text) in enumerate(zip(pairs, replies, expected, strict=True))
        if reply.text != text
    ]
    if differing:
        said("FAIL", what, f"{len(differing)} of {len(replies)} differ: {'; '.join(differing[:5])}")
    else:
        said("PASS", f"{what} ({len(replies)} of {len(replies)})")


def check_counts(name: str, runner: Runner, replies: Sequence[Reply], texts: Sequence[int]) -> None:
    """Compare the prompt tokens that the server counted with text and the plan's visual tokens."""
    what, planned = f"{name}: usage.prompt_tokens", runner.plan.vision_tokens
    seen = {reply.prompt_tokens - text for reply, text in zip(replies, texts, strict=True)}
    if seen == {planned}:
        said("PASS", f"{what} (text and {planned} visual tokens)")
    else:
        said("FAIL", what, f"{sorted(seen)} visual tokens, the plan has {planned}")


def check_together(name: str, url: str, asked: Sequence[Messages], replies: Sequence[Reply]) -> None:
    """Ask two at a time, and compare with what was answered alone."""
    what, count = f"{name}: two at a time", 2 * min(PAIRS, len(asked) // 2)
    try:
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda messages: ask(url, messages, MAX_TOKENS).text, asked[:count]))
    except ServerError as error:
        said("FAIL", what, str(error))
        return
    differing = [
        f"number {number} was answered {answer!r}, alone {reply.text!r}"
        for number, (answer, reply) in enumerate(zip(answers, replies[:count], strict=True))
        if answer != reply.text
    ]
    if differing:
        said("FAIL", what, "; ".join(differing))
    else:
        said("PASS", f"{what} ({count} answers as alone)")


def check_report(name: str, runner: Runner, path: Path, before: int, texts: Sequence[int]) -> None:
    """Compare the report's lines, one for each request, with the plan's tokens in every part of the decoder."""
    what, plan = f"{name}: VTEXPORT_REPORT", runner.plan
    lines = report_lines(path)[before:]
    if sorted(line["text"] for line in lines) != sorted(texts):
        said(
            "FAIL", what, f"{len(lines)} lines for {len(texts)} requests, or other text tokens than theirs; see {path}"
        )
        return
    layers = [0, *(stage + 1 for stage in sorted(plan.decoder_stages))]
    planned = {layer: plan.per_layer[layer] for layer in layers}
    for line in lines:
        seen = {part["layer"]: part["visual_tokens"] for part in line["parts"]}
        if seen != planned:
            said("FAIL", what, f"visual tokens by layer {seen}, the plan has {planned}")
            return
    said("PASS", f"{what} ({len(lines)} lines, visual tokens {' > '.join(map(str, planned.values()))})")


def report_lines(path: Path) -> list[dict[str, Any]]:
    """What the server's model has reported so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def latency(arguments: argparse.Namespace) -> None:
    """Time streamed answers of equal length, each about a new image; write milliseconds of every round."""
    first, each = [], []
    for number in range(WARM_UP + arguments.rounds * REQUESTS):
        text = {"type": "text", "text": QUESTIONS[0]}
        messages = [{"role": "user", "content": [image_part(photo(arguments.first + number)), text]}]
        timed = ask_streaming(arguments.url, messages, TOKENS)
        if number >= WARM_UP:
            first.append(timed.first_token)
            each.append(timed.per_token)
    rounds = [slice(start, start + REQUESTS) for start in range(0, len(first), REQUESTS)]
    measured = {
        "first_token": [median(first[part]) for part in rounds],
        "per_token": [median(each[part]) for part in rounds],
    }
    arguments.json.write_text(json.dumps(measured) + "\n", encoding="utf-8")


def table(arguments: argparse.Namespace) -> None:
    """Print medians of dense and pruned, the span of the rounds, and how many times as fast pruned is."""
    dense, pruned = (json.loads(path.read_text()) for path in (arguments.dense, arguments.pruned))
    print(f"\n{'median ms (rounds)':20}{'dense':>26}{'pruned':>26}{'ratio':>8}")
    for key, name in (("first_token", "time to first token"), ("per_token", "time per token")):
        cells = [f"{median(side[key]):.2f} ({min(side[key]):.2f}-{max(side[key]):.2f})" for side in (dense, pruned)]
        print(f"{name:20}{cells[0]:>26}{cells[1]:>26}{median(dense[key]) / median(pruned[key]):7.2f}x")


def wait(arguments: argparse.Namespace) -> None:
    """Wait until a server is healthy: exit code 0; 3 once its log says `--message`, 4 when it ended, 5 after the time."""
    deadline = time.monotonic() + arguments.seconds
    while time.monotonic() < deadline:
        if arguments.message and arguments.message in arguments.log.read_text(errors="replace"):
            raise SystemExit(3)
        if not _alive(arguments.pid):
            raise SystemExit(4)
        if healthy(arguments.url):
            return
        time.sleep(0.2)
    raise SystemExit(5)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def older(arguments: argparse.Namespace) -> None:
    """Copy a checkpoint that transformers 5 saved into the form that 4 reads; print where to find it in that form."""
    source, folder = arguments.checkpoint.resolve(), arguments.folder
    config = json.loads((source / "config.json").read_text())
    if "rope_parameters" not in config["text_config"]:
        print(source)
        return
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    for part in (config, config["text_config"], config["vision_config"]):
        if "dtype" in part:
            part["torch_dtype"] = part.pop("dtype")
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["text_config"]["rope_scaling"] = rope
    config.setdefault("image_token_index", config.get("image_token_id"))
    _replace(folder / "config.json", config)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    for name in ("extra_special_tokens", "backend", "processor_class"):
        tokenizer.pop(name, None)
    _replace(folder / "tokenizer_config.json", {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"})
    if (source / "processor_config.json").is_file():
        processor = json.loads((source / "processor_config.json").read_text())
        images = processor.pop("image_processor", None)
        if images is not None:
            _replace(folder / "preprocessor_config.json", images)
            _replace(folder / "processor_config.json", processor)
    print(folder)


def _replace(path: Path, data: Any) -> None:
    """Write a file in place of what may be a link to another's."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(call: Any, *arguments: str, **types: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(call.__name__, help=call.__doc__)
        made.set_defaults(call=call)
        for argument in arguments:
            made.add_argument(argument, type=types.get(argument, Path))
        return made

    checked = command(check, "bundle", "url", url=str)
    checked.add_argument("--name", default="bundle")
    checked.add_argument("--report", type=Path, required=True)
    checked.add_argument("--against", type=Path)
    checked.add_argument("--embeddings", action="store_true")
    checked.add_argument("--held-out", action="store_true")
    checked.add_argument("--questions", type=int, default=24)
    timed = command(latency, "url", url=str)
    timed.add_argument("--json", type=Path, required=True)
    timed.add_argument("--rounds", type=int, default=3)
    timed.add_argument("--first", type=int, default=0, help="number of the first image")
    command(table, "dense", "pruned")
    waiting = command(wait, "url", "pid", "seconds", url=str, pid=int, seconds=float)
    waiting.add_argument("--message", default="")
    waiting.add_argument("--log", type=Path)
    command(older, "checkpoint", "folder")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
