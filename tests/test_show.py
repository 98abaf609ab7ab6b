"""The picture of `vtexport show`: captions are whole, in any script, and merged patches have their token's colour."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import MICRO
from tests.conftest import noise_images
from vtexport.measure import captions
from vtexport.measure.captions import Caption
from vtexport.measure.drawing import draw
from vtexport.measure.moments import hues, moments
from vtexport.measure.show import Shown, look_at
from vtexport.runtime.runner import Runner


def said(caption: Caption) -> str:
    return "".join(text for line in caption._lines for text, _ in line)


@pytest.fixture(scope="module")
def shown(build_bundle) -> Shown:
    bundle = build_bundle(MICRO, 0.25, "sparsevlm", debug=True)
    return look_at(Runner.open(bundle), noise_images(1)[0], "what digit is red?")


@pytest.mark.parametrize(
    "text",
    ["what digit is red?", "a long question, " * 60, "x" * 900, "caf\u00e9 \u0394 \u042f " * 40, "", "two\n\nlines"],
)
def test_captions_are_whole_in_lines_that_fit(text: str) -> None:
    caption = Caption(text, 472)
    assert said(caption).replace(" ", "") == "".join(text.split())
    assert all(sum(font.getlength(part) for part, font in line) <= 473 for line in caption._lines)
    assert caption.height >= 22 * len(caption._lines)


def test_nothing_is_drawn_as_a_box() -> None:
    # No font has these: they are for private use.
    assert said(Caption("a \ue123\ue124 b \x1b", 900)) == "a [2 characters that no font here can draw] b \\x1b"


def test_without_fontconfig_captions_tell_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("fc-match")

    monkeypatch.setattr(subprocess, "run", gone)
    monkeypatch.setattr(captions, "find_spec", lambda _: None)
    captions._files.cache_clear()
    try:
        assert said(Caption("\u4e2d\u6587?", 900)) == "[2 characters that no font here can draw]?"
    finally:
        captions._files.cache_clear()


def test_a_long_question_and_a_long_answer_make_the_picture_taller(shown: Shown) -> None:
    short = draw(shown, "micro")
    answer = "word " * 300
    long = draw(replace(shown, question="why? " * 5000, answer=answer), "micro")
    assert long.width == short.width
    assert long.height > short.height + 300
    # Every line of the answer is drawn: more words make it longer.
    assert (
        draw(replace(shown, answer=answer + "word " * 100), "micro").height
        > draw(replace(shown, answer=answer), "micro").height
    )


def test_merged_patches_have_their_tokens_colour(shown: Shown) -> None:
    found = moments(shown)
    most = max(found, key=lambda moment: len(moment.groups))
    assert len(most.groups) >= most.recycled > 0
    assert len(set(hues(found).values())) >= len(most.groups)
    left = 488 * found.index(most)
    black = Image.new("RGB", shown.views[0].size, "black")
    tints = np.asarray(draw(replace(shown, views=[black]), "micro"), dtype=float)[-480:, left : left + 480]
    colours = set()
    for group in most.groups:
        tints_of_group = {tuple(tints[row * 40 + 20, column * 40 + 20]) for _, row, column in group}
        assert len(tints_of_group) == 1
        colours |= tints_of_group
    assert len(colours) == len(most.groups)
    untold = draw(replace(shown, debug={}, views=[black]), "micro")
    assert np.asarray(untold)[-480:, left : left + 480].max() == 0
