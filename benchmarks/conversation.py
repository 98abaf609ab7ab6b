"""What an earlier turn does to micro-llava's second question: accuracy, and which patches stay, alone and in two turns.

    python benchmarks/conversation.py [--limit N] [--workers 1] [--json FILE]

Prints a Markdown table; the last line is one JSON object. The second question is a held-out one about one digit. The
first is of the same kind, about another digit of the image, with another answer, and its true answer stands between them.
It is of the same kind because micro-llava was never trained on two turns: after a question of another kind, it answers in
that one's manner. *Patches kept* is the share of the patches of a question's digit that leave the last pruning stage.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import tables
from accuracy import Job
from PIL import Image
from rich.progress import track

from vtexport import Answer, BuildOptions, Runner, build
from vtexport.cli.console import stderr
from vtexport.measure.evaluate import BATCH, MAX_NEW_TOKENS
from vtexport.micro import heldout, scenes

METHODS = ("sparsevlm", "fastv", "fastervlm")
KEEPS = (0.44, 0.25)
GRID = 12
SEED = 4211


@dataclass(frozen=True)
class Talk:
    """Two questions about one image, and the patches (row, column) of the digit that each is about."""

    image: Any
    first: scenes.Question
    second: scenes.Question
    patches: tuple[frozenset[tuple[int, ...]], frozenset[tuple[int, ...]]]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation up to the second question."""
        return [
            {"role": "user", "content": self.first.text},
            {"role": "assistant", "content": self.first.answer},
            {"role": "user", "content": self.second.text},
        ]


def talks(limit: int) -> Iterator[Talk]:
    """A conversation for each of the first `limit` held-out questions that is about one digit, where there is another."""
    for number, example in enumerate(heldout.examples(limit)):
        rng = np.random.default_rng([heldout.SEED, number // len(scenes.KINDS)])
        scene = scenes.compose(rng, "heldout")
        second = example.question
        if (digit := about(second, scene)) is None:
            continue
        others = [
            (question, other)
            for question in scenes.questions(scene)
            if question.kind == second.kind and question.answer != second.answer
            if (other := about(question, scene)) not in (None, digit)
        ]
        if others:
            first, other = others[np.random.default_rng([SEED, number]).integers(len(others))]
            assert other is not None
            patches = (patches_of(other, scene), patches_of(digit, scene))
            yield Talk(Image.fromarray(example.image), first, second, patches)


def about(question: scenes.Question, scene: scenes.Scene) -> scenes.Digit | None:
    """The digit that a question names by value or colour; None if it names none."""
    words = question.text.rstrip("?").split()
    return next((digit for digit in scene.digits if {str(digit.value), digit.colour} & set(words)), None)


def patches_of(digit: scenes.Digit, scene: scenes.Scene) -> frozenset[tuple[int, ...]]:
    """The patches that show `digit`, as (row, column)."""
    values, _ = scenes.patch_labels([scene], scenes.IMAGE_SIZE // GRID)
    return frozenset(divmod(int(place), GRID) for place in np.flatnonzero(values[0] == digit.value))


def kept(answer: Answer, patches: frozenset[tuple[int, ...]]) -> float:
    """The share of `patches` that leave the last pruning stage as they are."""
    if not answer.stages:
        return 1.0
    return len(patches.intersection(cell for cell in answer.stages[-1].grid if cell is not None)) / len(patches)


def measure(job: Job, limit: int) -> dict[str, Any]:
    """Build one bundle and ask the second question of every conversation, alone and in it, with one thread."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        options = BuildOptions("micro-llava", job.keep, job.method, dtype="fp32", self_check=False)
        runner = Runner(build(options, Path(scratch) / "bundle"), threads=1)
        source = talks(limit)
        while batch := list(islice(source, BATCH)):
            alone = runner.ask([(talk.image, talk.second.text) for talk in batch], MAX_NEW_TOKENS)
            after = runner.ask([(talk.image, talk.messages) for talk in batch], MAX_NEW_TOKENS)
            for talk, one, two in zip(batch, alone, after, strict=True):
                earlier, asked = talk.patches
                for name, value in (
                    ("accuracy_alone", one.text == talk.second.answer),
                    ("accuracy_second", two.text == talk.second.answer),
                    ("asked_alone", kept(one, asked)),
                    ("unasked_alone", kept(one, earlier)),
                    ("asked_second", kept(two, asked)),
                    ("asked_before", kept(two, earlier)),
                ):
                    found.setdefault(name, []).append(float(value))
        last = runner.plan.stages[-1].kept if runner.plan.stages else runner.plan.num_visual_tokens
    return {"last_kept": last, **{name: mean(values) for name, values in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=heldout.NUM_QUESTIONS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    todo = [Job("dense", 1.0), *(Job(method, keep) for keep in KEEPS for method in METHODS)]
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        results = pool.map(measure, todo, [arguments.limit] * len(todo))
        points = list(zip(todo, track(results, "build and ask", total=len(todo), console=stderr), strict=True))
    every = [{"method": job.method, "keep": job.keep, **point} for job, point in points]
    result = {"questions": sum(1 for _ in talks(arguments.limit)), "points": every}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(tables.conversation({"conversation": {"result": result}}))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
