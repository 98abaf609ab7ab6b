"""Images and questions in, answers out, over any bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtexport.bundle import Bundle
from vtexport.errors import TargetError
from vtexport.generate import Request, Timings, generate
from vtexport.models.prompt import Prompter
from vtexport.pruning.plan import PruningPlan
from vtexport.targets import get_target
from vtexport.targets.base import Array


@dataclass(frozen=True)
class StageReport:
    """What one stage did with one image.

    Attributes:
        where: the stage.
        tokens_in: visual tokens that entered it.
        kept: tokens that survived as they were.
        recycled: tokens made by merging others.
        index: the kept tokens, as indices into the stage's input.
        grid: for each token that leaves the stage the (row, column) of its image cell; None where it has none.
    """

    where: str
    tokens_in: int
    kept: int
    recycled: int
    index: list[int]
    grid: list[tuple[int, int] | None]


@dataclass(frozen=True)
class Answer:
    """One answer, and how it came about."""

    text: str
    token_ids: list[int]
    visual_tokens: dict[str, float]
    stages: list[StageReport]
    timings_ms: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """The object that `vtexport run --json` prints."""
        data = asdict(self)
        for stage in data["stages"]:
            stage["in"] = stage.pop("tokens_in")
        return data


class Runner:
    """An opened bundle, ready to answer."""

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        """Open `bundle` on its target; `threads` 0 leaves the number to the runtime.

        Raises:
            TargetError: the target cannot run here.
        """
        manifest = bundle.manifest
        target = get_target(manifest.target.name)
        available = target.can_run()
        if not available.works:
            raise TargetError(f"{bundle.folder} cannot run here: {available.reason}")
        self.bundle = bundle
        self.plan: PruningPlan = manifest.plan.plan()
        self.engine = target.open(bundle.folder, manifest.target.graphs, threads)
        self.prompter = Prompter(bundle.processor_folder, manifest.model.image_token_id, manifest.model.image_size)

    @classmethod
    def open(cls, folder: Path, threads: int = 0) -> Runner:
        """Open the bundle in `folder`; see `Bundle.open` and `Runner`."""
        return cls(Bundle.open(folder), threads)

    def request(self, image: Any, question: str) -> Request:
        """The request that asks `question` about `image`, a PIL image."""
        return Request(self.prompter.prompt(question), self.prompter.pixels(image))

    def ask(
        self,
        pairs: Sequence[tuple[Any, str]],
        max_new_tokens: int = 64,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """Answer (image, question) pairs as one batch; see `vtexport.generate.generate`."""
        self.engine.load()
        start = time.perf_counter()
        requests = [self.request(image, question) for image, question in pairs]
        preprocess = 1000 * (time.perf_counter() - start)
        model = self.bundle.manifest.model
        results, timings = generate(
            self.engine,
            self.plan,
            requests,
            max_new_tokens,
            eos_token_ids=model.eos_token_ids,
            max_positions=model.max_positions,
            on_token=on_token,
        )
        return [
            Answer(
                text=self.prompter.decode(result.token_ids),
                token_ids=result.token_ids,
                visual_tokens={
                    "total": self.plan.num_visual_tokens,
                    "mean": self.plan.mean_visual_tokens,
                    "mean_sparsevlm_count": self.plan.mean_visual_tokens_sparsevlm,
                },
                stages=stage_reports(self.plan, model.grid, result.kept),
                timings_ms=_milliseconds(preprocess, timings),
            )
            for result in results
        ]


def stage_reports(plan: PruningPlan, grid: int, kept: Mapping[str, Array]) -> list[StageReport]:
    """What `plan` did with an image, given the kept indices of each stage by its name (`Result.kept`)."""
    reports = []
    cells: list[tuple[int, int] | None] = [None] * plan.leading
    cells += [divmod(i, grid) for i in range(plan.num_visual_tokens - plan.leading)]
    for stage in plan.stages:
        # A stage that merges every patch lists none; leading tokens stay all the same.
        every = range(plan.leading) if stage.layer is None else range(0)
        index = [int(i) for i in kept.get(stage.where, np.array(every))]
        cells = [cells[i] for i in index] + [None] * stage.recycled
        reports.append(StageReport(stage.where, stage.tokens_in, stage.kept, stage.recycled, index, cells))
    return reports


def _milliseconds(preprocess: float, timings: Timings) -> dict[str, float | None]:
    per_token = timings.per_token
    return {
        "preprocess": round(preprocess, 3),
        "vision": round(timings.vision, 3),
        "prefill": round(timings.prefill, 3),
        "per_token": None if per_token is None else round(per_token, 3),
    }
