"""Bundles that answer the same questions, one after the other, and how the first compares with each other one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtexport.builder.build import build_dense_twin, build_random_twin, check_twin
from vtexport.errors import InputError
from vtexport.measure.evaluate import Reply, Score, ask, check_items
from vtexport.measure.machine import device_name
from vtexport.measure.questions import Item
from vtexport.measure.scoring import Metric
from vtexport.measure.significance import Comparison, compare
from vtexport.runtime.runner import Runner

if TYPE_CHECKING:
    from vtexport.bundle.folder import Bundle
    from vtexport.progress import Progress

#: bundles that are built of the first one's weights
TWINS = ("dense", "random")


@dataclass(frozen=True)
class Settings:
    """How to ask: the metric, prompts per batch, tokens per answer at most, and a bundle that ranks for the first one."""

    metric: Metric
    batch: int
    max_new_tokens: int
    ranking_from: Path | None = None


@dataclass(frozen=True)
class Side:
    """One bundle: what it is called, its method, its score, and the first bundle's comparison with it."""

    name: str
    method: str
    score: Score
    comparison: Comparison | None = None

    def to_json(self) -> dict[str, Any]:
        """The object that `vtexport eval --json` prints for it."""
        compared = {} if self.comparison is None else {"comparison": self.comparison.to_json()}
        return {"bundle": self.name, "method": self.method, **self.score.to_json(), **compared}


@dataclass(frozen=True)
class Results:
    """All sides, the given bundle first, and under which conditions they answered."""

    sides: tuple[Side, ...]
    settings: Settings
    device: str

    def to_json(self) -> dict[str, Any]:
        """The object that `vtexport eval --json` prints."""
        this, *others = self.sides
        return {
            **this.to_json(),
            "metric": self.settings.metric.name,
            "batch": self.settings.batch,
            "max_new_tokens": self.settings.max_new_tokens,
            "device": self.device,
            **({"against": [other.to_json() for other in others]} if others else {}),
        }

    def lines(self) -> list[dict[str, Any]]:
        """One object per question, with the answers and scores of all sides."""
        this, *others = self.sides
        return [
            {
                "id": reply.item.id,
                "prompt": reply.item.prompt,
                "answers": list(reply.item.answers),
                **_said(reply),
                **({"against": {one.name: _said(one.score.replies[number]) for one in others}} if others else {}),
            }
            for number, reply in enumerate(this.score.replies)
        ]


def evaluate_sides(
    folder: Path, against: Sequence[str], items: Sequence[Item], settings: Settings, progress: Progress
) -> Results:
    """Ask the bundle in `folder`, and then each other one, all of `items`.

    Only one bundle's graphs are loaded at a time. No outputs of the vision stage are kept, so that times are those of new
    images even if several questions are about one.

    Args:
        folder: the bundle.
        against: other bundles' folders; `"dense"` and `"random"` are built of the first one's weights, the latter at the
            mean number of visual tokens with which the first one answered.
        items: the questions, at least one.
        settings: how to ask.
        progress: where to report.

    Raises:
        VtexportError: a bundle that cannot be opened, asked or built, or a question that one cannot take.
    """
    for name in against:
        if list(against).count(name) > 1:
            raise InputError(f"--against {name} is given twice; give it once")
    runners = _opened(folder, against, items, settings, progress)
    assert runners[0] is not None, "the first bundle is there"
    bundle, sides = runners[0].bundle, list[Side]()
    for number, name in enumerate([str(folder), *against]):
        # Taken out of the list, so that its memory is free before the next one is loaded.
        runner, runners[number] = runners[number], None
        first = sides[0].score if sides else None
        with tempfile.TemporaryDirectory() as scratch:
            if runner is None:
                assert first is not None, "the first bundle is no twin"
                runner = Runner(_twin(bundle, name, first, Path(scratch), progress), vision_cache=0)
            sides.append(_side(name, runner, items, settings, first, progress))
            del runner
    return Results(tuple(sides), settings, device_name())


def _opened(
    folder: Path, against: Sequence[str], items: Sequence[Item], settings: Settings, progress: Progress
) -> list[Runner | None]:
    """The first bundle and the others, None for a twin, opened and checked before the first question is asked."""
    this = Runner.open(folder, ranking_from=settings.ranking_from, vision_cache=0)
    runners: list[Runner | None] = [this]
    for name in against:
        if name in TWINS:
            check_twin(this.bundle, name)
            runners.append(None)
            continue
        other = Runner.open(name, vision_cache=0)
        if other.given:
            raise InputError(
                f"{name} waits for another bundle's ranking, which only the first bundle can get; swap them"
            )
        runners.append(other)
    if this.given and settings.ranking_from is None:
        raise InputError(f"{folder} prunes by another bundle's ranking; give that bundle as --ranking-from")
    there = [runner for runner in runners if runner is not None]
    progress.stage("check questions", len(items) * len(there))
    for runner in there:
        dense = runner is this and "dense" in against
        check_items(runner, items, settings.max_new_tokens, progress.advance, dense=dense)
    return runners


def _said(reply: Reply) -> dict[str, Any]:
    return {"answer": reply.text, "score": reply.score}


def _twin(bundle: Bundle, method: str, score: Score, scratch: Path, progress: Progress) -> Bundle:
    """The bundle of `method` that goes with `bundle`, which answered as `score` says."""
    if method == "dense":
        return build_dense_twin(bundle, scratch / method, progress)
    tokens = bundle.manifest.pruning_plans()[0].num_visual_tokens
    return build_random_twin(bundle, score.mean_visual_tokens / tokens, scratch / method, progress)


def _side(
    name: str, runner: Runner, items: Sequence[Item], settings: Settings, first: Score | None, progress: Progress
) -> Side:
    progress.stage(f"ask {name}", len(items))
    score = ask(runner, items, settings.metric, settings.batch, settings.max_new_tokens, progress.advance)
    graded = settings.metric.graded
    comparison = None if first is None else compare(first.scores, score.scores, graded=graded)
    return Side(name, runner.plan.method, score, comparison)
