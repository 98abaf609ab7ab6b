"""What became of an image's patches, stage by stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vtexport.arrays import Array
from vtexport.measure.show import Shown
from vtexport.pruning.plan import VISION
from vtexport.runtime.answer import StageReport

#: a view's number, and a row and a column of its patches
Cell = tuple[int, int, int]


@dataclass(frozen=True)
class Moment:
    """The patches before pruning, or behind one stage.

    Attributes:
        name: what the page calls it.
        entering: visual tokens that entered the stage; before pruning, all of them.
        kept: tokens that stay as they were.
        recycled: tokens made by merging others.
        own: patches that have a token of their own.
        merged: patches that a merged token stands for, as far as a debug build tells.
        groups: the same patches, token by token.
        scores: the patches' scores in this stage, in a debug build.
        ranks: the rank of each of them, from 1: in the vision stage among the patches of its view, which is pruned by
            itself, in the decoder among all visual tokens.
        rated: by view, the number of tokens that these ranks are of.
    """

    name: str
    entering: int
    kept: int
    recycled: int
    own: Collection[Cell]
    merged: Collection[Cell]
    groups: Sequence[frozenset[Cell]]
    scores: Mapping[Cell, float]
    ranks: Mapping[Cell, int]
    rated: Sequence[int]

    @property
    def short(self) -> str:
        """The name in a table."""
        return self.name.removeprefix("after decoder ")

    @property
    def tokens(self) -> int:
        """Visual tokens that go on."""
        return self.kept + self.recycled


def moments(shown: Shown) -> list[Moment]:
    """The patches before pruning and behind each stage, in order."""
    cells = [None if cell is None else with_view(cell) for cell in shown.entering]
    # The patches that each token stands for: a merged one has several, a newline none.
    members = [frozenset(() if cell is None else (cell,)) for cell in cells]
    found = [Moment("before pruning", len(cells), len(cells), 0, {c for c in cells if c}, (), (), {}, {}, ())]
    for stage in shown.stages:
        score, cluster = (shown.debug.get(f"{kind}.{stage.where}") for kind in ("score", "cluster"))
        scores, ranks, rated = ({}, {}, ()) if score is None else _rated(shown, stage, score, cells)
        members = [members[i] for i in stage.index] + _merged(stage, cluster, members)
        cells = [cells[i] for i in stage.index] + [None] * stage.recycled
        groups = [m for m, cell in zip(members, cells, strict=True) if cell is None and m]
        merged = frozenset().union(*groups)
        own = {cell for cell in cells if cell is not None}
        found.append(
            Moment(_name(stage), stage.tokens_in, stage.kept, stage.recycled, own, merged, groups, scores, ranks, rated)
        )
    return found


def with_view(cell: tuple[int, ...]) -> Cell:
    """`cell` with the number of its view, which `StageReport.grid` leaves out where there is one view."""
    view, row, column = cell if len(cell) == 3 else (0, *cell)
    return view, row, column


def patches_of(shown: Shown) -> list[Cell]:
    """Every patch of every view, as a vision stage counts them."""
    grid = shown.grid
    return [(view, row, column) for view in range(len(shown.views)) for row in range(grid) for column in range(grid)]


def _rated(
    shown: Shown, stage: StageReport, score: Array, cells: Sequence[Cell | None]
) -> tuple[dict[Cell, float], dict[Cell, int], tuple[int, ...]]:
    """Scores, ranks and numbers for a `Moment`, from a stage's scores; `cells` are those of the tokens that entered."""
    views, values = len(shown.views), np.asarray(score, dtype=np.float64)
    if stage.where != VISION:
        scores, ranks, number = _ranked(values[: len(cells)], cells)
        return scores, ranks, (number,) * views
    of_views = [
        _ranked(part, [cell for cell in patches_of(shown) if cell[0] == view])
        for view, part in enumerate(values.reshape(views, -1))
    ]
    scores = {cell: value for part, _, _ in of_views for cell, value in part.items()}
    ranks = {cell: rank for _, part, _ in of_views for cell, rank in part.items()}
    return scores, ranks, tuple(number for _, _, number in of_views)


def _ranked(values: Array, cells: Sequence[Cell | None]) -> tuple[dict[Cell, float], dict[Cell, int], int]:
    """Scores and ranks by patch, and the number of tokens that have a score; padding has none."""
    order = [int(i) for i in np.argsort(-values, kind="stable") if np.isfinite(values[i])]
    scores, ranks = {}, {}
    for rank, place in enumerate(order, start=1):
        cell = cells[place]
        if cell is not None:
            scores[cell], ranks[cell] = float(f"{values[place]:.4g}"), rank
    return scores, ranks, len(order)


def _merged(stage: StageReport, cluster: Array | None, members: list[frozenset[Cell]]) -> list[frozenset[Cell]]:
    """The patches of each merged token; none where the build does not say what was merged."""
    merged: list[frozenset[Cell]] = [frozenset()] * stage.recycled
    kept = set(stage.index)
    for place, number in enumerate([] if cluster is None else cluster[: len(members)].tolist()):
        if number >= 0 and place not in kept:
            merged[number] |= members[place]
    return merged


def _name(stage: StageReport) -> str:
    return "vision stage" if stage.where == VISION else f"after decoder layer {stage.where.rpartition('.')[2]}"


def hues(found: Sequence[Moment]) -> dict[frozenset[Cell], float]:
    """A hue in [0, 1) for each merged token, by its patches: the same at all stages, far from those made before it."""
    groups = dict.fromkeys(group for moment in found for group in moment.groups)
    # Steps of the golden ratio divide a circle evenly however many there are.
    return {group: number * 0.6180339887 % 1 for number, group in enumerate(groups)}
