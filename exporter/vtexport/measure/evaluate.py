"""eval: exact match on micro-llava's held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vtexport.errors import InputError
from vtexport.micro import heldout, scenes
from vtexport.runtime.runner import Runner

BATCH = 16
# "bottom right" and the end token are three tokens; a longer answer is wrong for every question.
MAX_NEW_TOKENS = 6


@dataclass(frozen=True)
class Score:
    """Exact matches over all questions and by kind of question, and the number of questions per keep ratio."""

    right: int
    total: int
    by_kind: dict[str, tuple[int, int]]
    by_keep: dict[float, int]
    mean_visual_tokens: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.total

    def to_json(self) -> dict[str, Any]:
        """The object that `vtexport eval --json` prints."""
        return {
            "accuracy": self.accuracy,
            "questions": self.total,
            "by_kind": {kind: right / total for kind, (right, total) in self.by_kind.items()},
            "by_keep": self.by_keep,
            "mean_visual_tokens": self.mean_visual_tokens,
        }


def evaluate(
    runner: Runner,
    limit: int = heldout.NUM_QUESTIONS,
    advance: Callable[[int], None] = lambda _n: None,
    *,
    blank: bool = False,
) -> Score:
    """Ask `runner` the first `limit` held-out questions.

    Args:
        runner: an opened bundle.
        limit: number of questions, 1 … `heldout.NUM_QUESTIONS`.
        advance: called with the number of questions done.
        blank: black out the images, to see what the questions alone give away.

    Raises:
        InputError: a limit out of range.
    """
    from PIL import Image

    if not 1 <= limit <= heldout.NUM_QUESTIONS:
        raise InputError(f"--limit {limit} is out of range; give 1 to {heldout.NUM_QUESTIONS}")
    counts = {kind: [0, 0] for kind in scenes.KINDS}
    by_keep = {plan.keep: 0 for plan in runner.plans}
    tokens = 0.0
    for batch in _batches(heldout.examples(limit)):
        pairs = [(Image.fromarray(example.image * (0 if blank else 1)), example.question.text) for example in batch]
        for example, answer in zip(batch, runner.ask(pairs, MAX_NEW_TOKENS), strict=True):
            counts[example.question.kind][0] += answer.text == example.question.answer
            counts[example.question.kind][1] += 1
            by_keep[answer.keep] += 1
            tokens += answer.visual_tokens["mean"]
        advance(len(batch))
    by_kind = {kind: (right, total) for kind, (right, total) in counts.items() if total}
    right, total = (sum(column) for column in zip(*by_kind.values(), strict=True))
    return Score(right, total, by_kind, by_keep, tokens / total)


def _batches(examples: Iterator[heldout.Example]) -> Iterator[list[heldout.Example]]:
    while batch := list(islice(examples, BATCH)):
        yield batch
