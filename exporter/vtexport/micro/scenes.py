"""Images of coloured handwritten digits on photographs, and questions about them.

The digits are scikit-learn's 8 x 8 handwritten digits, the photographs those that the wheels of
scikit-image and scikit-learn carry. Which digits and which photographs may appear is decided by
the split, so nothing seen in training appears in the held-out set.

Questions are of four kinds, `digit`, `colour`, `where` and `count`; which visual tokens answer a
question depends on what it asks, and most of the image answers none.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import MissingDependencyError

Split = Literal["train", "heldout"]

IMAGE_SIZE = 96
DIGIT_SIZE = 16
KINDS = ("digit", "colour", "where", "count")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 45),
    "green": (50, 205, 70),
    "blue": (70, 110, 255),
    "yellow": (250, 225, 50),
    "pink": (255, 120, 225),
    "cyan": (60, 230, 235),
}
COLOUR_NAMES = tuple(COLOURS)
MIN_DIGITS, MAX_DIGITS = 2, 4

# Every fifth digit of the 1,797 is held out, and these photographs.
_HELDOUT_EVERY = 5
_PHOTOS: dict[Split, tuple[str, ...]] = {
    "train": ("astronaut.png", "rocket.jpg", "motorcycle_left.png", "grass.png", "brick.png",
              "hubble_deep_field.jpg", "ihc.png", "flower.jpg"),
    "heldout": ("coffee.png", "chelsea.png", "china.jpg", "gravel.png"),
}  # fmt: skip


@dataclass(frozen=True)
class Digit:
    """One digit of a scene: what it is, its colour, and its box's upper left corner in pixels."""

    value: int
    colour: str
    x: int
    y: int

    @property
    def where(self) -> str:
        """The quadrant of the image that holds the digit's centre, such as `"top left"`."""
        half = IMAGE_SIZE // 2
        vertical = "top" if self.y + DIGIT_SIZE // 2 < half else "bottom"
        horizontal = "left" if self.x + DIGIT_SIZE // 2 < half else "right"
        return f"{vertical} {horizontal}"


@dataclass(frozen=True)
class Question:
    """A question about a scene and its one right answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """An image, `uint8 [96, 96, 3]`, and the digits on it, no digit or colour twice."""

    image: Array
    digits: tuple[Digit, ...]


@functools.cache
def _digit_masks(split: Split) -> dict[int, Array]:
    """Digit value -> its handwritten examples in `split`, float32 [n, 8, 8] in [0, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", extra="micro") from error
    data = load_digits()
    index = np.arange(len(data.target))
    chosen = (index % _HELDOUT_EVERY == 0) == (split == "heldout")
    images = (data.images / 16.0).astype(np.float32)
    return {value: images[chosen & (data.target == value)] for value in range(10)}


@functools.cache
def _photographs(split: Split) -> tuple[Array, ...]:
    """The photographs of `split`, each uint8 [H, W, 3]."""
    try:
        import skimage
        import sklearn.datasets
    except ImportError as error:
        raise MissingDependencyError("scikit-image", extra="micro") from error
    from pathlib import Path

    from PIL import Image

    folders = [
        Path(skimage.__file__).parent / "data",
        Path(sklearn.datasets.__file__).parent / "images",
    ]
    photos = []
    for name in _PHOTOS[split]:
        path = next(folder / name for folder in folders if (folder / name).is_file())
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
            # About 300 pixels on the short side, so that a 96-pixel crop shows an object and not a blur.
            scale = 300 / min(photo.size)
            photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
            photos.append(np.asarray(photo))
    return tuple(photos)


def _background(rng: np.random.Generator, split: Split) -> Array:
    """A crop of a photograph at half its colour and brightness, so that digits stand out."""
    photos = _photographs(split)
    photo = photos[rng.integers(len(photos))]
    y = rng.integers(photo.shape[0] - IMAGE_SIZE + 1)
    x = rng.integers(photo.shape[1] - IMAGE_SIZE + 1)
    crop = photo[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE].astype(np.float32)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    grey = crop.mean(axis=2, keepdims=True)
    return np.asarray((grey + 0.5 * (crop - grey)) * 0.5)


def _draw_mask(rng: np.random.Generator, split: Split, value: int) -> Array:
    """One handwritten `value`, resampled bilinearly to 16 x 16; in training slightly rotated and stretched."""
    examples = _digit_masks(split)[value]
    source = examples[rng.integers(len(examples))]
    angle, scale_x, scale_y, shift_x, shift_y = 0.0, 1.0, 1.0, 0.0, 0.0
    if split == "train":
        angle = rng.uniform(-0.2, 0.2)
        scale_x, scale_y = rng.uniform(0.88, 1.12, size=2)
        shift_x, shift_y = rng.uniform(-0.4, 0.4, size=2)
    centred = (np.arange(DIGIT_SIZE) + 0.5) * (8 / DIGIT_SIZE) - 4.0
    grid_y, grid_x = np.meshgrid(centred, centred, indexing="ij")
    cos, sin = np.cos(angle), np.sin(angle)
    at_x = (cos * grid_x - sin * grid_y) / scale_x + shift_x + 3.5
    at_y = (sin * grid_x + cos * grid_y) / scale_y + shift_y + 3.5
    padded = np.pad(source, 2)
    at_x = np.clip(at_x + 2, 0, 10.999)
    at_y = np.clip(at_y + 2, 0, 10.999)
    left, top = at_x.astype(int), at_y.astype(int)
    fx, fy = at_x - left, at_y - top
    upper = padded[top, left] * (1 - fx) + padded[top, left + 1] * fx
    lower = padded[top + 1, left] * (1 - fx) + padded[top + 1, left + 1] * fx
    return np.asarray(upper * (1 - fy) + lower * fy, dtype=np.float32)


def _positions(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """`count` corners (x, y), boxes apart from each other and clear of the image's midlines."""
    corners: list[tuple[int, int]] = []
    while len(corners) < count:
        # Near the 8-pixel patch grid, so that a digit is about four patches, but never exactly on it.
        corner = rng.integers(0, IMAGE_SIZE // 8 - 1, size=2) * 8 + rng.integers(-2, 3, size=2)
        x, y = (int(v) for v in np.clip(corner, 0, IMAGE_SIZE - DIGIT_SIZE))
        middle = (IMAGE_SIZE - DIGIT_SIZE) // 2
        if abs(x - middle) < 6 or abs(y - middle) < 6:
            continue
        if all(max(abs(x - u), abs(y - v)) >= DIGIT_SIZE + 2 for u, v in corners):
            corners.append((x, y))
    return corners


def compose(rng: np.random.Generator, split: Split, count: int | None = None, max_digits: int = MAX_DIGITS) -> Scene:
    """A random scene.

    Args:
        rng: source of all randomness; equal generators give equal scenes.
        split: which handwritings and photographs may appear.
        count: number of digits; drawn from 2 … `max_digits` if None.
        max_digits: the most digits drawn when `count` is None.
    """
    if count is None:
        count = int(rng.integers(MIN_DIGITS, max_digits + 1))
    values = rng.permutation(10)[:count]
    colours = rng.permutation(len(COLOUR_NAMES))[:count]
    canvas = _background(rng, split)
    digits = []
    for value, colour, (x, y) in zip(values, colours, _positions(rng, count), strict=True):
        name = COLOUR_NAMES[colour]
        mask = np.minimum(1.0, 1.25 * _draw_mask(rng, split, int(value)))[..., None]
        box = (slice(y, y + DIGIT_SIZE), slice(x, x + DIGIT_SIZE))
        paint = np.array(COLOURS[name], dtype=np.float32) * rng.uniform(0.9, 1.0)
        canvas[box] = canvas[box] * (1 - mask) + paint * mask
        digits.append(Digit(int(value), name, x, y))
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), tuple(digits))


def questions(scene: Scene) -> list[Question]:
    """Every question that can be asked about `scene`, in a fixed order."""
    asked: list[Question] = []
    for digit in scene.digits:
        asked += [
            Question("digit", f"what digit is {digit.colour}?", str(digit.value)),
            Question("colour", f"what colour is the {digit.value}?", digit.colour),
            Question("where", f"where is the {digit.value}?", digit.where),
            Question("where", f"where is the {digit.colour} digit?", digit.where),
        ]
    asked.append(Question("count", "how many digits are there?", str(len(scene.digits))))
    return asked


def descriptions(scene: Scene) -> list[Question]:
    """Open questions for training only, whose answers list all digits in the order of `COLOURS` or of their values."""
    by_colour = sorted(scene.digits, key=lambda digit: COLOUR_NAMES.index(digit.colour))
    by_value = sorted(scene.digits, key=lambda digit: digit.value)
    return [
        Question("list", "list the digits.", " and ".join(f"{d.colour} {d.value}" for d in by_colour)),
        Question("list", "list the colours.", " and ".join(f"{d.value} {d.colour}" for d in by_value)),
        Question("list", "where are the digits?", " and ".join(f"{d.value} {d.where}" for d in by_value)),
    ]


def patch_labels(scenes: Sequence[Scene], patch_size: int) -> tuple[Array, Array]:
    """What lies under each patch, the training signal of the vision tower.

    Returns:
        digit [B, g*g] (0 … 9, 10 = background) and colour [B, g*g] (6 = background), int64, where a
        patch shows a digit if the digit's box covers at least a quarter of it.
    """
    grid = IMAGE_SIZE // patch_size
    value = np.full((len(scenes), grid, grid), 10, dtype=np.int64)
    colour = np.full((len(scenes), grid, grid), len(COLOUR_NAMES), dtype=np.int64)
    starts = np.arange(grid) * patch_size
    for row, scene in enumerate(scenes):
        for digit in scene.digits:
            across, down = (
                np.clip(np.minimum(at + DIGIT_SIZE, starts + patch_size) - np.maximum(at, starts), 0, None)
                for at in (digit.x, digit.y)
            )
            under = down[:, None] * across[None, :] >= patch_size * patch_size / 4
            value[row][under] = digit.value
            colour[row][under] = COLOUR_NAMES.index(digit.colour)
    return value.reshape(len(scenes), -1), colour.reshape(len(scenes), -1)
