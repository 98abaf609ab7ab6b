"""Images of any resolution: a base view, and the tiles of a grid that is chosen at build."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtexport.errors import InputError, ModelError
from vtexport.models.bounds import PINPOINTS, TILES, TOGETHER
from vtexport.models.family import Family, parse_config, pixels_of, processed
from vtexport.models.spec import ModelSpec, ViewChoice, ViewSpec, VisionSpec
from vtexport.models.views import Size, Views, rows_of


class Anyres(Family):
    """A family whose images are cut into tiles; a bundle is built for one grid of tiles."""

    def views(self, path: Path, parsed: Any, vision: VisionSpec, choice: ViewChoice) -> ViewSpec:
        if vision.leading:
            raise ModelError(f"{path}: vision_feature_select_strategy 'full' puts CLS between tiles; use 'default'")
        images = choice.images or 1
        tiles = self.tiles(path, parsed, vision, choice, images)
        newlines = 0 if choice.arrangement == "views" else 1 if tiles is None else tiles[0] * vision.grid
        return ViewSpec(images, 1 if tiles is None else 1 + tiles[0] * tiles[1], tiles, newlines)

    def tiles(self, path: Path, parsed: Any, vision: VisionSpec, choice: ViewChoice, images: int) -> Size | None:
        """Rows and columns of the tiles of each image, in a prompt of `images` images; None for the base view alone."""
        known = [
            _tiles(resolution, vision.image_size)
            for resolution in _pinpoints(path, parsed.image_grid_pinpoints, vision)
        ]
        names = ", ".join(f"{rows}x{columns}" for rows, columns in known)
        if choice.grid is None:
            raise InputError(
                f"--grid is missing: a {self.model_type} model cuts images into rows x columns of tiles, and a bundle "
                f"is built for one grid; give one of {names}"
            )
        match = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", choice.grid)
        if match is None or (int(match[1]), int(match[2])) not in known:
            raise InputError(f"--grid {choice.grid} is no grid of this model; give one of {names}")
        return int(match[1]), int(match[2])

    def resolutions(self, spec: ModelSpec) -> Sequence[Size]:
        path, found = Path("config.json"), spec.config.get("image_grid_pinpoints")
        if found is None:
            # transformers' default; its configuration class takes milliseconds, and this runs for every prompt.
            found = parse_config(path, spec.config).image_grid_pinpoints
        return _pinpoints(path, found, spec.vision)

    def look(self, processor: Any, spec: ModelSpec, pictures: Sequence[Any]) -> Views:
        sizes = [(picture.height, picture.width) for picture in pictures]
        if spec.views.tiles is not None:
            known = self.resolutions(spec)
            for size in sizes:
                _check_grid(spec.views.tiles, spec.vision.image_size, known, size)
        pixels = pixels_of(self.process(processor, pictures))
        pixels = pixels[:, : spec.views.views].reshape(-1, *pixels.shape[2:])
        return Views(pixels, rows_of(spec, sizes) if spec.views.newlines else None)

    def process(self, processor: Any, pictures: Sequence[Any]) -> Any:
        """The image processor's output for the pictures of one prompt."""
        return processed(processor, list(pictures))


def _pinpoints(path: Path, found: Any, vision: VisionSpec) -> list[Size]:
    """The resolutions that the model lists, `found` in its config, in rows and columns of pixels, each of whole tiles."""
    size = vision.image_size
    if not isinstance(found, list | tuple) or not 0 < len(found) <= PINPOINTS:
        raise ModelError(f"{path}: image_grid_pinpoints must list 1 to {PINPOINTS} resolutions; check the file")
    for point in found:
        two = isinstance(point, list | tuple) and len(point) == 2 and all(type(extent) is int for extent in point)
        if not two or not all(size <= extent <= TILES * size and extent % size == 0 for extent in point):
            raise ModelError(
                f"{path}: image_grid_pinpoints must list pairs of multiples of {size} (one tile) up to {TILES * size}; "
                "check the file"
            )
        if math.prod(_tiles(point, size)) > TOGETHER:
            raise ModelError(
                f"{path}: image_grid_pinpoints lists more than {TOGETHER} tiles for an image; check the file"
            )
    return [(point[0], point[1]) for point in found]


def _tiles(resolution: Sequence[int], image_size: int) -> Size:
    return resolution[0] // image_size, resolution[1] // image_size


def _check_grid(tiles: Size, image_size: int, known: Sequence[Size], size: Size) -> None:
    """Refuse an image of `size` that fits another grid, of those that are `known`, better than the bundle's `tiles`."""
    from transformers.image_processing_utils import select_best_resolution

    rows, columns = _tiles(select_best_resolution(size, known), image_size)
    if (rows, columns) != tiles:
        built = "x".join(map(str, tiles))
        raise InputError(
            f"an image of {size[1]} x {size[0]} pixels is cut into {rows}x{columns} tiles, and this bundle was built "
            f"for {built}; build one with --grid {rows}x{columns}, or crop the image"
        )
