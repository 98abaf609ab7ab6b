"""A prompt's images as the vision graph takes them, and the order of their tokens if they are laid out by rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vtexport.arrays import Array
from vtexport.models.spec import ModelSpec

Size = tuple[int, int]


@dataclass(frozen=True)
class Rows:
    """The visual sequence of a prompt laid out by rows (`ViewSpec.newlines`), padded to V places.

    Attributes:
        sequence: [V] int64, which token stands at each place: patch p of view v is v · P + p, image i's newline is
            T · P + i, and T · P + n stands for no token (T views of P patches, n images).
        row_start: [V] int64, for a newline the first place of its row, for any other place that place itself.
        length: [n] int64, number of places of each image.
    """

    sequence: Array
    row_start: Array
    length: Array


@dataclass(frozen=True)
class Views:
    """A prompt's images: pixels [T, 3, S, S] fp32, and the rows of their tokens where the model has newlines."""

    pixels: Array
    rows: Rows | None = None


def rows_of(spec: ModelSpec, sizes: list[Size]) -> Rows:
    """The rows of images whose heights and widths in pixels are `sizes`.

    The base view's tokens come first, without a newline if tiles follow. Rows and columns of the stitched tiles that
    are padding are left out (LLaVA-NeXT's `spatial_unpad`).
    """
    v, grid, patches = spec.views, spec.vision.grid, spec.vision.num_patches
    newline, none = v.total * patches, v.total * patches + v.images
    sequence = np.full(spec.num_visual_tokens, none, dtype=np.int64)
    row_start = np.arange(spec.num_visual_tokens)
    lengths, place = [], 0
    for image, size in enumerate(sizes):
        first = image * v.views * patches
        lines = [np.arange(patches)]
        if v.tiles is not None:
            lines += _unpadded(_stitched(v.tiles, grid), size)
        begin = place
        for number, line in enumerate(lines):
            sequence[place : place + len(line)] = first + line
            start, place = place, place + len(line)
            if number > 0 or v.tiles is None:
                sequence[place], row_start[place] = newline + image, start
                place += 1
        lengths.append(place - begin)
    return Rows(sequence, row_start, np.array(lengths, dtype=np.int64))


def _stitched(tiles: Size, grid: int) -> Array:
    """The patches of the tiles as one picture, [rows · grid, columns · grid]; view 0 is the base view."""
    rows, columns = tiles
    patch = np.arange(1, 1 + rows * columns)[:, None] * grid * grid + np.arange(grid * grid)
    return patch.reshape(rows, columns, grid, grid).transpose(0, 2, 1, 3).reshape(rows * grid, columns * grid)


def _unpadded(picture: Array, size: Size) -> list[Array]:
    """The rows of `picture` that an image of `size` covers, scaled to fit and centred; rounded as transformers does."""
    height, width = size
    rows, columns = picture.shape
    if width / height > columns / rows:
        edge = (rows - int(round(height * (columns / width), 7))) // 2
        return list(picture[edge : rows - edge])
    edge = (columns - int(round(width * (rows / height), 7))) // 2
    return list(picture[:, edge : columns - edge])
