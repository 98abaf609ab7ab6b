"""The page of `vtexport show`: the image with its patches, stage by stage."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtexport.arrays import Array
from vtexport.measure.pages.page import rendered
from vtexport.measure.show import Shown
from vtexport.models.prompt import Prompt
from vtexport.pruning.plan import VISION
from vtexport.runtime.answer import StageReport
from vtexport.runtime.runner import Runner

#: a view's number, and a row and a column of its patches
Cell = tuple[int, int, int]
KEPT, MERGED, DROPPED, ABSENT = "kmd-"


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
    cells = [None if cell is None else _with_view(cell) for cell in shown.entering]
    # The patches that each token stands for: a merged one has several, a newline none.
    members = [frozenset(() if cell is None else (cell,)) for cell in cells]
    found = [Moment("before pruning", len(cells), len(cells), 0, {c for c in cells if c}, (), {}, {}, ())]
    for stage in shown.stages:
        score, cluster = (shown.debug.get(f"{kind}.{stage.where}") for kind in ("score", "cluster"))
        scores, ranks, rated = ({}, {}, ()) if score is None else _rated(shown, stage, score, cells)
        members = [members[i] for i in stage.index] + _merged(stage, cluster, members)
        cells = [cells[i] for i in stage.index] + [None] * stage.recycled
        merged = frozenset().union(*(m for m, cell in zip(members, cells, strict=True) if cell is None))
        own = {cell for cell in cells if cell is not None}
        found.append(
            Moment(_name(stage), stage.tokens_in, stage.kept, stage.recycled, own, merged, scores, ranks, rated)
        )
    return found


def show_page(runner: Runner, shown: Shown) -> str:
    """A page of what the bundle of `runner` did with an image."""
    manifest, found = runner.bundle.manifest, moments(shown)
    prompt = runner.prompter.prompt(shown.question) if shown.question else None
    patches = [[_states(shown, moment, view) for moment in found] for view in range(len(shown.views))]
    values = {
        "shown": shown,
        "plan": shown.plan,
        "bundle": runner.bundle.folder,
        "manifest": manifest,
        "moments": found,
        "pictures": [_data_uri(view) for view in shown.views],
        "paths": [[{kind: _path(s, kind, shown.grid) for kind in KEPT + MERGED + DROPPED + ABSENT} for s in view]
                  for view in patches],
        "words": None if prompt is None else _words(runner, prompt, shown.debug.get("raters")),
        "raters": None if shown.plan.methods.decoder is None else shown.plan.methods.decoder.raters,
        "scored": any(moment.scores for moment in found),
        "tells": any(moment.merged for moment in found),
        # Only the decoder's stages give out what they merge.
        "could_tell": not manifest.debug and any(stage.recycled for stage in shown.plan.decoder_stages.values()),
        "could_score": any(part.scores for part in shown.plan.methods.parts),
        "data": _data(shown, found, patches),
    }  # fmt: skip
    return rendered("show.html.jinja", values, "show.js")


def _with_view(cell: tuple[int, ...]) -> Cell:
    view, row, column = cell if len(cell) == 3 else (0, *cell)
    return view, row, column


def _patches(shown: Shown) -> list[Cell]:
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
        _ranked(part, [cell for cell in _patches(shown) if cell[0] == view])
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


def _states(shown: Shown, moment: Moment, view: int) -> str:
    """One letter per patch of a view, row by row."""
    present = {_with_view(cell) for cell in shown.entering if cell is not None}

    def state(cell: Cell) -> str:
        if cell in moment.own:
            return KEPT
        if cell in moment.merged:
            return MERGED
        return DROPPED if cell in present else ABSENT

    return "".join(state((view, row, column)) for row in range(shown.grid) for column in range(shown.grid))


def _runs(states: str, kind: str, grid: int) -> Iterator[tuple[int, int, int]]:
    """Row, first column and length of every run of patches in state `kind`."""
    for row in range(grid):
        line, column = states[row * grid : (row + 1) * grid], 0
        while (column := line.find(kind, column)) >= 0:
            length = len(line[column:]) - len(line[column:].lstrip(kind))
            yield row, column, length
            column += length


def _path(states: str, kind: str, grid: int) -> str:
    """An SVG path around the patches in state `kind`, a patch being one unit wide."""
    return "".join(f"M{column} {row}h{length}v1h-{length}z" for row, column, length in _runs(states, kind, grid))


def _data_uri(view: Any) -> str:
    file = io.BytesIO()
    view.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _words(runner: Runner, prompt: Prompt, raters: Array | None) -> list[tuple[str, str, bool]]:
    """The pieces of the prompt behind its last image: the space before each, its text, and whether it rates."""
    first, words = prompt.image_positions[-1], []
    for place, piece in enumerate(runner.prompter.pieces(prompt)[first:], start=first):
        text = piece.lstrip()
        space = piece[: len(piece) - len(text)] if place > first else ""
        words.append((space, text, raters is not None and bool(raters[place])))
    return words


def _data(shown: Shown, found: list[Moment], patches: list[list[str]]) -> dict[str, Any]:
    """What the page's script reads."""

    def listed(values: Mapping[Cell, Any], view: int) -> list[Any]:
        return [values.get(cell) for cell in _patches(shown) if cell[0] == view]

    return {
        "grid": shown.grid,
        "moments": [
            {"name": m.name, "tokens": m.tokens, "entering": m.entering, "recycled": m.recycled, "rated": m.rated}
            for m in found
        ],
        "views": [
            {
                "states": states,
                "scores": [listed(m.scores, view) if m.scores else None for m in found],
                "ranks": [listed(m.ranks, view) if m.ranks else None for m in found],
            }
            for view, states in enumerate(patches)
        ],
    }
