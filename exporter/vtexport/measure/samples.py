"""Pictures to measure with, generated so that no file is needed."""

from __future__ import annotations

from typing import Any

import numpy as np

from vtexport.runtime.runner import Runner


def sample_photo(size: tuple[int, int] = (640, 480)) -> Any:
    """A picture of smooth noise, for which preprocessing works as for a photograph."""
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def sample_pictures(runner: Runner) -> Any:
    """The sample photo, once per image of a prompt; if images are tiled, in the shape of the grid, which costs most."""
    views, side = runner.spec.views, runner.spec.vision.image_size
    photo = sample_photo() if views.tiles is None else sample_photo((views.tiles[1] * side, views.tiles[0] * side))
    return photo if views.pictures == 1 else runner.prompter.grouped([photo] * views.pictures)
