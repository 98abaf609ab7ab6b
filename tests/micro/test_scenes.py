"""Scenes: reproducible, answerable, and held out."""

from __future__ import annotations

import numpy as np

from vtexport.micro import heldout, scenes


def test_equal_generators_give_equal_scenes() -> None:
    one, two = (scenes.compose(np.random.default_rng(3), "heldout") for _ in range(2))
    np.testing.assert_array_equal(one.image, two.image)
    assert one.digits == two.digits


def test_a_scene_has_every_digit_and_colour_once_and_no_overlap() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        digits = scenes.compose(rng, "train").digits
        assert len({d.value for d in digits}) == len({d.colour for d in digits}) == len(digits)
        assert scenes.MIN_DIGITS <= len(digits) <= scenes.MAX_DIGITS
        boxes = [(d.x, d.y) for d in digits]
        for i, (x, y) in enumerate(boxes):
            assert all(max(abs(x - u), abs(y - v)) >= scenes.DIGIT_SIZE for u, v in boxes[:i])


def test_digits_are_painted_in_their_colour() -> None:
    scene = scenes.compose(np.random.default_rng(5), "heldout")
    for digit in scene.digits:
        box = scene.image[digit.y : digit.y + scenes.DIGIT_SIZE, digit.x : digit.x + scenes.DIGIT_SIZE].astype(int)
        nearest = {name: np.abs(box - np.array(c)).sum(axis=2).min() for name, c in scenes.COLOURS.items()}
        assert min(nearest, key=nearest.__getitem__) == digit.colour


def test_splits_share_no_handwriting_and_no_photograph() -> None:
    train, held = scenes._digit_masks("train"), scenes._digit_masks("heldout")
    assert sum(len(v) for v in train.values()) + sum(len(v) for v in held.values()) == 1797
    assert not set(scenes._PHOTOS["train"]) & set(scenes._PHOTOS["heldout"])


def test_questions_have_one_answer_each() -> None:
    scene = scenes.compose(np.random.default_rng(2), "heldout", count=3)
    asked = scenes.questions(scene)
    assert {question.kind for question in asked} == set(scenes.KINDS)
    assert len({question.text for question in asked}) == len(asked) == 4 * 3 + 1
    assert asked[-1].answer == "3"


def test_patch_labels_mark_the_patches_under_digits() -> None:
    batch = [scenes.compose(np.random.default_rng(4), "train", count=2)]
    value, colour = scenes.patch_labels(batch, 8)
    for digit in batch[0].digits:
        centre = (digit.y + 8) // 8 * 12 + (digit.x + 8) // 8
        assert value[0, centre] == digit.value
        assert scenes.COLOUR_NAMES[colour[0, centre]] == digit.colour
    assert 0.9 < (value == 10).mean() < 0.97


def test_the_held_out_set_is_fixed_and_balanced() -> None:
    examples = list(heldout.examples())
    assert len(examples) == heldout.NUM_QUESTIONS >= 1000
    kinds = [example.question.kind for example in examples]
    assert all(kinds.count(kind) == heldout.NUM_IMAGES for kind in scenes.KINDS)
    assert [e.question.text for e in heldout.examples(3)] == [
        "what digit is cyan?",
        "what colour is the 6?",
        "where is the 9?",
    ]
