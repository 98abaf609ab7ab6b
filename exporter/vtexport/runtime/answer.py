"""The result for a user: the answer, what every stage did with the image, and the timings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vtexport.arrays import Array
from vtexport.models.views import Views
from vtexport.pruning import PruningPlan


@dataclass(frozen=True)
class StageReport:
    """What one stage did with one image.

    Attributes:
        where: the stage.
        tokens_in: visual tokens that entered it.
        kept: tokens that survived as they were.
        recycled: tokens made by merging others.
        index: the kept tokens, as indices into the stage's input.
        grid: the image cell of each token that leaves the stage: (row, column), or with several views (view, row,
            column); None for a token that has no cell, such as a merged one.
    """

    where: str
    tokens_in: int
    kept: int
    recycled: int
    index: list[int]
    grid: list[tuple[int, ...] | None]


@dataclass(frozen=True)
class Answer:
    """One answer, and how it came about.

    Attributes:
        text: the answer.
        token_ids: its tokens, the end token included if it came.
        keep: the keep ratio that this image got.
        spread: with `--keep auto`, how many patches share CLS attention, by which `keep` was chosen; else None.
        visual_tokens: `total` before pruning, `mean` over the decoder's layers, `mean_sparsevlm_count` by SparseVLM's
            way to count.
        stages: what each stage did.
        timings_ms: `preprocess`, `vision`, `prefill`, `per_token`, of the rows that ran together: the whole batch, or
            with `--keep auto` the rows of equal keep ratio (`vision` always of the whole batch).
        debug: the further outputs of a debug build, arrays by name (`vtexport.runtime.request.Result`); else empty.
    """

    text: str
    token_ids: list[int]
    keep: float
    spread: float | None
    visual_tokens: dict[str, float]
    stages: list[StageReport]
    timings_ms: dict[str, float | None]
    debug: Mapping[str, Array] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The object that `vtexport run --json` prints; it has no arrays."""
        data = asdict(self)
        del data["debug"]
        for stage in data["stages"]:
            stage["in"] = stage.pop("tokens_in")
        return data


def stage_reports(plan: PruningPlan, grid: int, kept: Mapping[str, Array], views: Views) -> list[StageReport]:
    """What `plan` did with the images `views`, given the kept indices of each stage by its name (`Result.kept`)."""
    reports = []
    cells = cells_of(plan, grid, views)
    entering = len(cells)
    for stage in plan.stages:
        # A stage that merges every patch lists no kept tokens, but keeps the leading ones.
        per_view = plan.num_visual_tokens // plan.views
        leading = (
            [i for i in range(per_view * plan.views) if i % per_view < plan.leading] if stage.layer is None else []
        )
        index = [int(i) for i in kept.get(stage.where, np.array(leading))]
        cells = [cells[i] for i in index] + [None] * stage.recycled
        reports.append(StageReport(stage.where, entering, len(index), stage.recycled, index, cells))
        entering = len(cells)
    return reports


def cells_of(plan: PruningPlan, grid: int, views: Views) -> list[tuple[int, ...] | None]:
    """The image cell of every visual token before pruning; see `StageReport.grid`."""
    patches = grid * grid

    def cell(number: int) -> tuple[int, ...]:
        view, patch = divmod(number, patches)
        return divmod(patch, grid) if plan.views == 1 else (view, *divmod(patch, grid))

    if views.rows is None:
        first: list[tuple[int, ...] | None] = [None] * plan.leading
        return [
            place for view in range(plan.views) for place in first + [cell(view * patches + i) for i in range(patches)]
        ]
    sequence = views.rows.sequence[: int(views.rows.length.sum())]
    return [cell(int(token)) if token < plan.views * patches else None for token in sequence]
