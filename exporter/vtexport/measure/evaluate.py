"""eval: how often a bundle answers right, and how fast, on questions with known answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, median
from typing import Any

from vtexport.errors import InputError
from vtexport.measure.questions import Item, heldout_items
from vtexport.measure.scoring import EXACT, Metric
from vtexport.micro import heldout
from vtexport.runtime.answer import Answer
from vtexport.runtime.runner import Runner

#: prompts per batch and tokens per answer at most, on the held-out questions
BATCH = 16
# "bottom right" and the end token are three tokens; a longer answer is wrong for every question.
MAX_NEW_TOKENS = 6


@dataclass(frozen=True)
class Reply:
    """What a bundle said to one question.

    Attributes:
        item: the question.
        text: the answer.
        score: its score, in [0, 1].
        keep: the keep ratio that its image got.
        visual_tokens: mean over the decoder's layers.
        first_token: milliseconds from the image to the first token, of the rows that ran together.
        per_token: milliseconds of a decode step of these rows; None if there was none.
        warm_up: whether it was in the first of several batches, in which a runtime still sets itself up.
    """

    item: Item
    text: str
    score: float
    keep: float
    visual_tokens: float
    first_token: float
    per_token: float | None
    warm_up: bool


@dataclass(frozen=True)
class Score:
    """The replies of one bundle to all questions, in their order, and what they come to.

    Times are medians over the questions without the first batch, unless there is only one. `keeps` are the keep ratios of
    the bundle.
    """

    replies: tuple[Reply, ...]
    keeps: tuple[float, ...]

    @property
    def total(self) -> int:
        """Number of questions."""
        return len(self.replies)

    @property
    def scores(self) -> list[float]:
        """The score of each question."""
        return [reply.score for reply in self.replies]

    @property
    def accuracy(self) -> float:
        """Mean score; where scores are 0 and 1, the share of right answers."""
        return mean(self.scores)

    @cached_property
    def by_kind(self) -> dict[str, tuple[float, int]]:
        """Sum of scores, and number of questions, by kind; nothing if questions have no kind."""
        kinds: dict[str, tuple[float, int]] = {}
        for reply in self.replies:
            if reply.item.kind:
                right, total = kinds.get(reply.item.kind, (0, 0))
                kinds[reply.item.kind] = right + reply.score, total + 1
        return kinds

    @cached_property
    def by_keep(self) -> dict[float, int]:
        """Number of questions by keep ratio."""
        return {keep: sum(reply.keep == keep for reply in self.replies) for keep in self.keeps}

    @property
    def mean_visual_tokens(self) -> float:
        """Visual tokens per decoder layer and question."""
        return mean(reply.visual_tokens for reply in self.replies)

    @property
    def first_token(self) -> float:
        """Milliseconds to the first token."""
        return median(reply.first_token for reply in self._timed)

    @property
    def per_token(self) -> float | None:
        """Milliseconds per further token; None if there were none."""
        known = [reply.per_token for reply in self._timed if reply.per_token is not None]
        return median(known) if known else None

    @property
    def _timed(self) -> Sequence[Reply]:
        return [reply for reply in self.replies if not reply.warm_up]

    def to_json(self) -> dict[str, Any]:
        """The object that `vtexport eval --json` prints for one bundle."""
        per_token = self.per_token
        return {
            "accuracy": self.accuracy,
            "questions": self.total,
            "by_kind": {kind: right / total for kind, (right, total) in self.by_kind.items()},
            "by_keep": self.by_keep,
            "mean_visual_tokens": self.mean_visual_tokens,
            "first_token_ms": round(self.first_token, 3),
            "per_token_ms": None if per_token is None else round(per_token, 3),
        }


def evaluate(
    runner: Runner,
    limit: int = heldout.NUM_QUESTIONS,
    advance: Callable[[int], None] = lambda _n: None,
    *,
    blank: bool = False,
) -> Score:
    """Ask `runner` the first `limit` of micro-llava's held-out questions, as `vtexport eval` does without `--data`.

    Args:
        runner: an opened bundle.
        limit: number of questions, 1 … `heldout.NUM_QUESTIONS`.
        advance: called with the number of questions done.
        blank: black out the images, to see what the questions alone give away.

    Raises:
        InputError: a limit out of range.
    """
    return ask(runner, heldout_items(limit, blank=blank), EXACT, BATCH, MAX_NEW_TOKENS, advance)


def check_items(
    runner: Runner,
    items: Sequence[Item],
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda _n: None,
    *,
    dense: bool = False,
) -> None:
    """Refuse what the bundle of `runner` cannot be asked, before it is asked anything.

    Args:
        runner: the bundle, whose graphs need not be loaded.
        items: the questions.
        max_new_tokens: tokens per answer at most.
        advance: called with the number of questions checked.
        dense: whether the same model without pruning will be asked too, which has more visual tokens.

    Raises:
        InputError: the bundle cannot answer by itself; a question has another number of images than its prompts, marks
            of images at odds with that, or exceeds its positions.
    """
    runner.need_language_model()
    folder, plan = runner.bundle.folder, runner.plan
    # Of images whose number of tokens varies, the engine itself checks how many there are.
    visual = 0 if plan.newlines else plan.num_visual_tokens if dense else plan.vision_tokens
    room = runner.bundle.manifest.model.max_positions - visual - max_new_tokens
    for item in items:
        if item.picture is None and len(item.images) != runner.prompter.images:
            raise InputError(
                f"{item.where}: it has {len(item.images)} images, but {folder} takes {runner.prompter.images} per "
                "prompt; give as many, or build with another --images"
            )
        folders = [image for image in item.images if image.is_dir()]
        if folders and not runner.spec.views.has_frames:
            raise InputError(f"{item.where}: {folders[0]} is a folder, but {folder} takes images; name an image file")
        try:
            prompt = runner.prompter.prompt(item.prompt)
        except InputError as error:
            raise InputError(f"{item.where}: {error}") from error
        if len(prompt.token_ids) > room:
            raise InputError(
                f"{item.where}: {len(prompt.token_ids)} tokens of text, {visual} of the image and {max_new_tokens} new ones "
                "exceed the model's positions; shorten the prompt or give a smaller --max-new-tokens"
            )
        advance(1)


def ask(
    runner: Runner,
    items: Sequence[Item],
    metric: Metric,
    batch: int,
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda _n: None,
) -> Score:
    """Ask `runner` all of `items` and score its answers.

    Args:
        runner: an opened bundle.
        items: at least one question.
        metric: how to score answers.
        batch: prompts per batch.
        max_new_tokens: tokens per answer at most.
        advance: called with the number of questions done.

    Raises:
        InputError: a file that is no image after all, or a question that the bundle cannot take.
    """
    replies: list[Reply] = []
    for start in range(0, len(items), batch):
        asked = items[start : start + batch]
        answers = _answers(runner, asked, max_new_tokens)
        for item, answer in zip(asked, answers, strict=True):
            times = answer.timings_ms
            replies.append(
                Reply(
                    item,
                    answer.text,
                    metric.score(answer.text, item.answers),
                    answer.keep,
                    answer.visual_tokens["mean"],
                    first_token(times),
                    times["per_token"],
                    warm_up=start == 0 and batch < len(items),
                )
            )
        advance(len(asked))
    return Score(tuple(replies), tuple(plan.keep for plan in runner.plans))


def _answers(runner: Runner, items: Sequence[Item], max_new_tokens: int) -> list[Answer]:
    where = items[0].where
    try:
        pairs = []
        for item in items:
            where = item.where
            pairs.append((item.pictures(runner.prompter), item.prompt))
        where = items[0].where if len(items) == 1 else f"{items[0].where}, or the {len(items) - 1} asked with it"
        return runner.ask(pairs, max_new_tokens)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def first_token(times: Mapping[str, float | None]) -> float:
    """Milliseconds to the first token, of an answer's `timings_ms`."""
    return sum(spent for stage, spent in times.items() if stage != "per_token" and spent is not None)
