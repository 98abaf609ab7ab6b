"""The page of `vtexport show`: the image with its patches, stage by stage."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from typing import Any

from vtexport.arrays import Array
from vtexport.measure.moments import Cell, Moment, hues, moments, patches_of, with_view
from vtexport.measure.pages.page import rendered
from vtexport.measure.show import Shown
from vtexport.models.prompt import Prompt
from vtexport.runtime.runner import Runner

KEPT, MERGED, DROPPED, ABSENT = "kmd-"


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
        "groups": [_groups(shown, found, view) for view in range(len(shown.views))],
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


def _states(shown: Shown, moment: Moment, view: int) -> str:
    """One letter per patch of a view, row by row."""
    present = {with_view(cell) for cell in shown.entering if cell is not None}

    def state(cell: Cell) -> str:
        if cell in moment.own:
            return KEPT
        if cell in moment.merged:
            return MERGED
        return DROPPED if cell in present else ABSENT

    return "".join(state((view, row, column)) for row in range(shown.grid) for column in range(shown.grid))


def _groups(shown: Shown, found: list[Moment], view: int) -> list[list[tuple[int, str]]]:
    """By moment, the hue in degrees and the path of each merged token's patches in a view."""
    colour, side = hues(found), range(shown.grid)

    def path(group: frozenset[Cell]) -> str:
        states = "".join(MERGED if (view, row, column) in group else ABSENT for row in side for column in side)
        return _path(states, MERGED, shown.grid)

    return [[(round(360 * colour[group]), path(group)) for group in moment.groups] for moment in found]


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
        return [values.get(cell) for cell in patches_of(shown) if cell[0] == view]

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
