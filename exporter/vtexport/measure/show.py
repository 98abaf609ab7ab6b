"""show: a picture of what a bundle keeps of an image, one panel per stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import InputError, StorageError
from vtexport.models.prompt import Prompt
from vtexport.models.spec import ViewSpec
from vtexport.pruning.plan import VISION
from vtexport.runtime.answer import StageReport, stage_reports
from vtexport.runtime.inputs import look
from vtexport.runtime.request import Request
from vtexport.runtime.runner import Runner

_PANEL = 480
_CAPTION = 28


def draw(runner: Runner, image: Any, question: str | None = None) -> Any:
    """The image as the vision tower sees it, then one panel per stage: kept cells bright, dropped ones dimmed.

    Args:
        runner: an opened bundle.
        image: a PIL image, or several; see `vtexport.models.prompt.Prompter.views`.
        question: if given, it is asked too, and its answer stands in the caption.

    Returns:
        A PIL image.
    """
    views = runner.prompter.views(image)
    seen = [runner.prompter.shown(view) for view in views.pixels]
    model = runner.bundle.manifest.model
    if question is None:
        if runner.plan.decoder_stages:
            raise InputError(
                f"method {runner.plan.method} keeps what the question asks for; give a question as --prompt"
            )
        # The decoder need not run to see what the vision stage keeps.
        if runner.reads_question:
            raise InputError(f"method {runner.plan.method} reads the question; give one as --prompt")
        vision = look(runner.engine, runner.plan, [Request(Prompt((), (0,) * runner.prompter.images), views)])
        bucket = int(runner.buckets(vision)[0])
        plan, kept = runner.plans[bucket], vision.seen(bucket).kept
        kept_by_stage = {} if kept is None else {VISION: kept[0][kept[0] >= 0]}
        stages = stage_reports(plan, model.grid, kept_by_stage, views)
        keep, caption = plan.keep, f"{model.name}: {plan.num_visual_tokens} visual tokens"
    else:
        answer = runner.ask([(image, question)])[0]
        stages, keep, caption = answer.stages, answer.keep, f"{question} {answer.text}"
    if runner.policy is not None:
        caption += f" (keep {keep:g} chosen)"
    lines = _lines(runner.spec.views)
    panels = [_panel(_mosaic(seen, lines), caption)]
    for stage in stages:
        dimmed = [_dimmed(view, model.grid, _of_view(stage, number)) for number, view in enumerate(seen)]
        panels.append(_panel(_mosaic(dimmed, lines), _describe(stage)))
    return _beside(panels)


def _lines(views: ViewSpec) -> list[list[int]]:
    """How views lie in a panel: a base view above its tiles, frames of a video four per line."""
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


def _mosaic(views: list[Any], lines: list[list[int]]) -> Any:
    """The views in one square picture, line by line."""
    from PIL import Image

    side = _PANEL // max(len(lines), *(len(line) for line in lines))
    picture = Image.new("RGB", (_PANEL, _PANEL), "white")
    for row, line in enumerate(lines):
        for column, view in enumerate(line):
            small = views[view].resize((side, side), Image.Resampling.BICUBIC)
            picture.paste(small, (column * side, row * side))
    return picture


def save(picture: Any, path: Path) -> None:
    """Write `picture` to `path`; see `vtexport.measure.files.check_picture`.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        picture.save(path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; give another -o") from error


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
