"""show: what a bundle keeps of an image."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtexport.arrays import Array
from vtexport.errors import InputError, first_line
from vtexport.models.prompt import Prompt
from vtexport.models.spec import ViewSpec
from vtexport.models.views import Views
from vtexport.pruning.plan import VISION, PruningPlan
from vtexport.runtime.answer import StageReport, cells_of, stage_reports
from vtexport.runtime.inputs import look
from vtexport.runtime.request import Request
from vtexport.runtime.runner import Runner


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
        saved(Image.new("RGB", (800, 400)), known)
    except Exception as error:
        raise InputError(f"{path}: unknown image format; give a name that ends in .png") from error
    return known


def saved(picture: Any, kind: str) -> bytes:
    """The file of `picture` in the format `kind`.

    Raises:
        InputError: it is larger than such files can be, as captions may be of any length.
    """
    file = io.BytesIO()
    try:
        picture.save(file, kind)
    except Exception as error:  # every format has errors of its own
        reason = f"{picture.width} x {picture.height} pixels do not fit into {kind} ({first_line(error)})"
        raise InputError(f"{reason}; give a name that ends in .png") from error
    return file.getvalue()
