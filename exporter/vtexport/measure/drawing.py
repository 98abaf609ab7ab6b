"""The picture of `vtexport show`: what a bundle keeps of an image, one panel per stage."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vtexport.arrays import Array
from vtexport.figures import number
from vtexport.measure.captions import Caption
from vtexport.measure.moments import Cell, Moment, hues, moments
from vtexport.measure.show import Shown
from vtexport.runtime.answer import StageReport

_PANEL, _GAP, _MARGIN = 480, 8, 4
#: height of a caption of one line
_CAPTION = 28
#: brightness of patches that are dropped, and of those that live on in a merged token
_DROPPED, _MERGED = 0.22, 0.5
#: characters of a question that are shown at its beginning and at its end, if it has more
_BEGINNING, _END = 1500, 500


def draw(shown: Shown, name: str) -> Any:
    """The image as the vision tower sees it, then one panel per stage: kept cells bright, dropped ones dimmed.

    Where a debug build tells what was merged, the patches of each merged token have a colour of their own. Question and
    answer stand above the panels.

    Args:
        shown: what there is to see.
        name: what to call the model.

    Returns:
        A PIL image.
    """
    chosen = f" (keep {number(shown.plan.keep)} chosen)" if shown.keep_chosen else ""
    captions = [f"{name}: {number(shown.plan.num_visual_tokens)} visual tokens{chosen}"]
    pictures = [_mosaic(shown.views, shown.lines)]
    found = moments(shown)
    colours = {group: colorsys.hls_to_rgb(hue, 0.6, 0.9) for group, hue in hues(found).items()}
    for stage, moment in zip(shown.stages, found[1:], strict=True):
        views = [_dimmed(view, shown.grid, place, moment, colours) for place, view in enumerate(shown.views)]
        pictures.append(_mosaic(views, shown.lines))
        captions.append(_describe(stage, moment))
    row = _beside(pictures, captions)
    return _below(shown.question, shown.answer, row) if shown.question else row


def _describe(stage: StageReport, moment: Moment) -> str:
    text = f"{stage.where}: {number(stage.kept)} of {number(stage.tokens_in)} kept"
    if not stage.recycled:
        return text
    merged = f"{text}, {number(stage.recycled)} merged"
    # Only the decoder's stages of a debug build tell of which patches.
    return (
        f"{merged}, a colour for each"
        if moment.groups
        else f"{merged} from the other {number(stage.tokens_in - stage.kept)}"
    )


def _dimmed(
    view: Any, grid: int, place: int, moment: Moment, colours: Mapping[frozenset[Cell], Sequence[float]]
) -> Any:
    """View number `place` behind a stage."""
    from PIL import Image

    light: Array = np.full((grid, grid, 1), _DROPPED, dtype=np.float32)
    tint: Array = np.zeros((grid, grid, 3), dtype=np.float32)
    for group in moment.groups:
        for number_of_view, *cell in group:
            if number_of_view == place:
                light[tuple(cell)], tint[tuple(cell)] = _MERGED, colours[group]
    for number_of_view, *cell in moment.own:
        if number_of_view == place:
            light[tuple(cell)], tint[tuple(cell)] = 1.0, 0.0
    large = view.resize((_PANEL, _PANEL), Image.Resampling.BICUBIC)
    places = np.arange(_PANEL) * grid // _PANEL
    light, tint = light[places][:, places], tint[places][:, places]
    pixels = np.asarray(large, dtype=np.float32) * light + 255 * (1 - _MERGED) * tint
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _mosaic(views: Sequence[Any], lines: Sequence[Sequence[int]]) -> Any:
    """The views in one square picture, line by line."""
    from PIL import Image

    side = _PANEL // max(len(lines), *(len(line) for line in lines))
    picture = Image.new("RGB", (_PANEL, _PANEL), "white")
    for row, line in enumerate(lines):
        for column, view in enumerate(line):
            small = views[view].resize((side, side), Image.Resampling.BICUBIC)
            picture.paste(small, (column * side, row * side))
    return picture


def _beside(pictures: Sequence[Any], captions: Sequence[str]) -> Any:
    """Panels side by side, each below its caption; all captions have the room that the longest takes."""
    from PIL import Image

    written = [Caption(caption, _PANEL - 2 * _MARGIN) for caption in captions]
    above = max(_CAPTION, *(caption.height + 6 for caption in written))
    width = len(pictures) * (_PANEL + _GAP) - _GAP
    row = Image.new("RGB", (width, above + _PANEL), "white")
    for place, (picture, caption) in enumerate(zip(pictures, written, strict=True)):
        left = place * (_PANEL + _GAP)
        caption.draw(row, left + _MARGIN, 3)
        row.paste(picture, (left, above))
    return row


def _below(question: str, answer: str, row: Any) -> Any:
    """`row` below the question and its answer."""
    from PIL import Image

    if len(question) > _BEGINNING + _END:
        left_out = number(len(question) - _BEGINNING - _END)
        question = f"{question[:_BEGINNING]} [{left_out} characters left out] {question[-_END:]}"
    room = row.width - 2 * _MARGIN
    asked, said = Caption(question, room), Caption(answer, room, size=20)
    above = asked.height + said.height + 3 * _MARGIN
    picture = Image.new("RGB", (row.width, above + row.height), "white")
    asked.draw(picture, _MARGIN, _MARGIN, fill="#58616c")
    said.draw(picture, _MARGIN, 2 * _MARGIN + asked.height)
    picture.paste(row, (0, above))
    return picture
