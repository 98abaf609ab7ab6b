"""The held-out set: fixed images and questions that micro-llava never saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtexport.micro import scenes

SEED = 20260
NUM_IMAGES = 300
NUM_QUESTIONS = NUM_IMAGES * len(scenes.KINDS)


@dataclass(frozen=True)
class Example:
    """One held-out question: the image (uint8 [96, 96, 3]), what is asked, and the right answer."""

    image: np.ndarray[Any, Any]
    question: scenes.Question


def examples(limit: int = NUM_QUESTIONS) -> Iterator[Example]:
    """The first `limit` held-out questions: each image is asked one question of every kind."""
    given = 0
    for number in range(NUM_IMAGES):
        rng = np.random.default_rng([SEED, number])
        scene = scenes.compose(rng, "heldout")
        asked = scenes.questions(scene)
        for kind in scenes.KINDS:
            if given == limit:
                return
            pool = [question for question in asked if question.kind == kind]
            yield Example(scene.image, pool[rng.integers(len(pool))])
            given += 1
