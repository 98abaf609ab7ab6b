"""show: a picture of what a bundle keeps of an image, one panel a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vtexport.errors import InputError, StorageError
from vtexport.pruning.plan import VISION
from vtexport.runtime import Runner, StageReport, stage_reports
from vtexport.targets.base import Array

_PANEL = 480
_CAPTION = 28


def draw(runner: Runner, image: Any, question: str | None = None) -> Any:
    """The image as the vision tower sees it, then one panel a stage: kept cells bright, dropped ones dimmed.

    Args:
        runner: an opened bundle.
        image: a PIL image.
        question: asked too if given, its answer in the caption.

    Returns:
        A PIL image.
    """
    seen = runner.prompter.shown(image)
    model = runner.bundle.manifest.model
    if question is None:
        if runner.plan.decoder_stages:
            raise InputError(
                f"method {runner.plan.method} keeps what the question asks for; give a --prompt to show it by"
            )
        # The decoder need not run to see what the vision stage keeps.
        if runner.questions is not None:
            raise InputError(f"method {runner.plan.method} reads the question; give a --prompt to show it by")
        vision = runner.engine.vision(runner.prompter.pixels(image)[None])
        bucket = 0 if runner.policy is None else int(runner.policy.choose(vision.spread)[0])
        plan, kept = runner.plans[bucket], vision.seen(bucket).kept
        stages = stage_reports(plan, model.grid, {} if kept is None else {VISION: kept[0]})
        keep, caption = plan.keep, f"{model.name}: {plan.num_visual_tokens} visual tokens"
    else:
        answer = runner.ask([(image, question)])[0]
        stages, keep, caption = answer.stages, answer.keep, f"{question} {answer.text}"
    if runner.policy is not None:
        caption += f" (keep {keep:g} chosen)"
    panels = [_panel(_enlarged(seen), caption)]
    for stage in stages:
        panels.append(_panel(_dimmed(seen, model.grid, stage), _describe(stage)))
    return _beside(panels)


def check_destination(path: Path) -> None:
    """Refuse before any work what `save` would refuse after it.

    Raises:
        InputError: a suffix that names no image format.
        StorageError: the folder is not there.
    """
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"{path}: unknown image format; give a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise StorageError(f"{path}: {path.absolute().parent} is not a folder; give another -o")


def save(picture: Any, path: Path) -> None:
    """Write `picture` to `path`; see `check_destination`.

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


def _enlarged(seen: Any) -> Any:
    from PIL import Image

    return seen.resize((_PANEL, _PANEL), Image.Resampling.BICUBIC)


def _dimmed(seen: Any, grid: int, stage: StageReport) -> Any:
    from PIL import Image

    light: Array = np.full((grid, grid), 0.22, dtype=np.float32)
    for cell in stage.grid:
        if cell is not None:
            light[cell] = 1.0
    mask = Image.fromarray((light * 255).astype(np.uint8)).resize((_PANEL, _PANEL), Image.Resampling.NEAREST)
    pixels = np.asarray(_enlarged(seen), dtype=np.float32) * (np.asarray(mask, dtype=np.float32)[..., None] / 255)
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
