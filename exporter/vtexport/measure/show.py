"""show: what a bundle keeps of an image, and a picture of it, one panel per stage."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import InputError
from vtexport.models.prompt import Prompt
from vtexport.models.spec import ViewSpec
from vtexport.models.views import Views
from vtexport.pruning.plan import VISION, PruningPlan
from vtexport.runtime.answer import StageReport, cells_of, stage_reports
from vtexport.runtime.inputs import look
from vtexport.runtime.request import Request
from vtexport.runtime.runner import Runner

_PANEL = 480
_CAPTION = 28


@dataclass(frozen=True)
class Shown:
    """What a bundle did with the image of a prompt.

    Attributes:
        views: the image as the vision tower sees it, a PIL image per view.
        lines: how views lie in a picture, the numbers of those in each line: a base view above its tiles, frames of a
            video four per line.
        grid: patches per side of a view.
        plan: the plan that the image got.
        entering: the image cell of each visual token before pruning (`StageReport.grid`).
        stages: what each stage did.
        question: the question, or "".
        answer: its answer, or "".
        debug: the further outputs of a debug build; see `vtexport.runtime.request.Result`.
        keep_chosen: whether the image's keep ratio was chosen for it.
    """

    views: Sequence[Any]
    lines: Sequence[Sequence[int]]
    grid: int
    plan: PruningPlan
    entering: Sequence[tuple[int, ...] | None]
    stages: Sequence[StageReport]
    question: str
    answer: str
    debug: Mapping[str, Array]
    keep_chosen: bool


def look_at(runner: Runner, image: Any, question: str | None = None) -> Shown:
    """Let a bundle prune an image, and answer a question about it.

    Args:
        runner: an opened bundle.
        image: a PIL image, or several; see `vtexport.models.prompt.Prompter.views`.
        question: the question; None runs the vision stage alone.

    Raises:
        InputError: the method needs a question.
    """
    views = runner.prompter.views(image)
    grid = runner.bundle.manifest.model.grid
    if question is None:
        plan, kept, debug = _unasked(runner, views)
        stages, text = stage_reports(plan, grid, kept, views), ""
    else:
        answer = runner.ask([(image, question)])[0]
        plan = next(plan for plan in runner.plans if plan.keep == answer.keep)
        stages, text, debug = answer.stages, answer.text, answer.debug
    return Shown(
        views=[runner.prompter.shown(view) for view in views.pixels],
        lines=_lines(runner.spec.views),
        grid=grid,
        plan=plan,
        entering=cells_of(plan, grid, views),
        stages=stages,
        question=question or "",
        answer=text,
        debug=debug,
        keep_chosen=runner.policy is not None,
    )


def _unasked(runner: Runner, views: Views) -> tuple[PruningPlan, Mapping[str, Array], Mapping[str, Array]]:
    """What the vision stage does: the plan that the image gets, the kept indices by stage, the debug outputs."""
    if runner.plan.decoder_stages:
        raise InputError(f"method {runner.plan.method} keeps what the question asks for; give a question as --prompt")
    # The decoder need not run to see what the vision stage keeps.
    if runner.reads_question:
        raise InputError(f"method {runner.plan.method} reads the question; give one as --prompt")
    vision = look(runner.engine, runner.plan, [Request(Prompt((), (0,) * runner.prompter.images), views)])
    bucket = int(runner.buckets(vision)[0])
    kept = vision.seen(bucket).kept
    by_stage = {} if kept is None else {VISION: kept[0][kept[0] >= 0]}
    debug = {} if vision.score is None else {f"score.{VISION}": vision.score[0]}
    return runner.plans[bucket], by_stage, debug


def draw(shown: Shown, name: str) -> Any:
    """The image as the vision tower sees it, then one panel per stage: kept cells bright, dropped ones dimmed.

    Args:
        shown: what there is to see.
        name: what to call the model.

    Returns:
        A PIL image.
    """
    caption = f"{name}: {shown.plan.num_visual_tokens} visual tokens"
    if shown.question:
        caption = f"{shown.question} {shown.answer}"
    if shown.keep_chosen:
        caption += f" (keep {shown.plan.keep:g} chosen)"
    panels = [_panel(_mosaic(shown.views, shown.lines), caption)]
    for stage in shown.stages:
        dimmed = [_dimmed(view, shown.grid, _of_view(stage, number)) for number, view in enumerate(shown.views)]
        panels.append(_panel(_mosaic(dimmed, shown.lines), _describe(stage)))
    return _beside(panels)


def _lines(views: ViewSpec) -> list[list[int]]:
    """See `Shown.lines`."""
    lines = []
    for image in range(views.images):
        first = image * views.views
        if views.tiles is None:
            lines += [list(range(first + i, first + min(i + 4, views.views))) for i in range(0, views.views, 4)]
            continue
        rows, columns = views.tiles
        lines.append([first])
        lines += [[first + 1 + row * columns + column for column in range(columns)] for row in range(rows)]
    return lines


def _of_view(stage: StageReport, view: int) -> list[tuple[int, ...]]:
    """The cells (row, column) of one view that leave `stage`."""
    return [cell[-2:] for cell in stage.grid if cell is not None and (len(cell) == 2 or cell[0] == view)]


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


def picture_format(path: Path) -> str:
    """The image format that the suffix of `path` asks for.

    Raises:
        InputError: it asks for none, or for one that such a picture cannot be saved in.
    """
    from PIL import Image

    # Pillow also lists suffixes of formats that it reads only, or writes with other programs or other colours.
    known = Image.registered_extensions().get(path.suffix.lower())
    try:
        if known is None:
            raise ValueError("no format")
        saved(Image.new("RGB", (2 * _PANEL, _PANEL)), known)
    except Exception as error:
        raise InputError(f"{path}: unknown image format; give a name that ends in .png") from error
    return known


def saved(picture: Any, kind: str) -> bytes:
    """The file of `picture` in the format `kind`."""
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def _describe(stage: StageReport) -> str:
    recycled = f", {stage.recycled} merged" if stage.recycled else ""
    return f"{stage.where}: {stage.kept} of {stage.tokens_in} kept{recycled}"


def _dimmed(view: Any, grid: int, cells: list[tuple[int, ...]]) -> Any:
    from PIL import Image

    light: Array = np.full((grid, grid), 0.22, dtype=np.float32)
    for cell in cells:
        light[cell] = 1.0
    large = view.resize((_PANEL, _PANEL), Image.Resampling.BICUBIC)
    mask = Image.fromarray((light * 255).astype(np.uint8)).resize((_PANEL, _PANEL), Image.Resampling.NEAREST)
    pixels = np.asarray(large, dtype=np.float32) * (np.asarray(mask, dtype=np.float32)[..., None] / 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _panel(picture: Any, caption: str) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    panel = Image.new("RGB", (_PANEL, _PANEL + _CAPTION), "white")
    panel.paste(picture, (0, _CAPTION))
    ImageDraw.Draw(panel).text((4, 5), caption, fill="black", font=ImageFont.load_default(16))
    return panel


def _beside(panels: list[Any]) -> Any:
    from PIL import Image

    gap = 8
    width = len(panels) * _PANEL + (len(panels) - 1) * gap
    row = Image.new("RGB", (width, _PANEL + _CAPTION), "white")
    for place, panel in enumerate(panels):
        row.paste(panel, (place * (_PANEL + gap), 0))
    return row
