"""Scores of an answer against the right ones: exact match, VQA accuracy, and the letter of an option."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: humans who must agree with an answer for full marks; with fewer answers than one more, none would be possible
AGREEING = 3

_ARTICLES = {"a", "an", "the"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
# The characters that VQA's evaluation takes for punctuation, besides period and comma.
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`?!,]")
_DIGIT_COMMA = re.compile(r"(?<=\d),(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")


def _contractions() -> dict[str, str]:
    """Contractions by their spelling without the apostrophe, but for those that spell another word, such as `its`."""
    endings = {
        "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
        "'ve": "i you we they who what could might must should would",
        "'d": "it he you they who that there how",
        "'ll": "it you they who that there what how why",
        "'re": "you they what there why",
        "'s": "he she that there what when where who why how somebody someone",
        "'m": "i",
    }
    found = {word + end.replace("'", ""): word + end for end, words in endings.items() for word in words.split()}
    return found | {"oclock": "o'clock", "maam": "ma'am", "yall": "y'all"}


_CONTRACTIONS = _contractions()


def plain(text: str) -> str:
    """`text` as exact match compares it: case, outer and repeated white space and final periods do not count."""
    return " ".join(text.casefold().split()).rstrip(". ")


def vqa_plain(text: str) -> str:
    """`text` as VQA accuracy compares it, by the rules at https://visualqa.org/evaluation.html.

    Lower case; no periods but decimal points; commas between digits go, other punctuation becomes a space (apostrophes and
    colons stay); number words up to ten become digits, articles go, and contractions get their apostrophe back.
    """
    text = _PUNCTUATION.sub(" ", _DIGIT_COMMA.sub("", _PERIOD.sub("", text.lower())))
    words = (_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES)
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def option(text: str) -> str | None:
    """The first option letter A to Z in `text`, or None.

    A letter of either case at the beginning, if nothing but punctuation is around it (`b`, `(B)`, `b. a cat`); else the
    first capital that stands alone (`The answer is B`).
    """
    found = re.match(r"\W*([A-Za-z])(?:\W*$|[.:),\]](?!\w))", text) or re.search(r"(?<![\w'])([A-Z])(?![\w'])", text)
    return None if found is None else found[1].upper()


def exact(answer: str, right: Sequence[str]) -> float:
    """1 if `answer` is one of `right`, as `plain` has them; else 0."""
    return float(plain(answer) in {plain(one) for one in right})


def vqa(answer: str, right: Sequence[str]) -> float:
    """VQA accuracy: min(1, humans who gave `answer` / 3), as the mean over all choices of all humans but one."""
    agreeing = sum(vqa_plain(one) == vqa_plain(answer) for one in right)
    left_out = agreeing * min(1.0, (agreeing - 1) / AGREEING)
    return (left_out + (len(right) - agreeing) * min(1.0, agreeing / AGREEING)) / len(right)


def choice(answer: str, right: Sequence[str]) -> float:
    """1 if the option that `answer` names is one of `right`; else 0."""
    return float(option(answer) in {option(one) for one in right})


def _enough(right: Sequence[str]) -> str:
    if len(right) > AGREEING:
        return ""
    return (
        f"has {len(right)} answers, and VQA accuracy needs at least {AGREEING + 1} (VQA has 10); give more, or another "
        "--metric"
    )


def _letters(right: Sequence[str]) -> str:
    wrong = next((one for one in right if not re.fullmatch(r"\W*[A-Za-z]\W*", one)), None)
    return "" if wrong is None else f"has the answer {wrong!r}, which is no option; give a letter A to Z"


def _any(_right: Sequence[str]) -> str:
    return ""


@dataclass(frozen=True)
class Metric:
    """How answers are scored.

    Attributes:
        name: what `--metric` calls it.
        score: the score of an answer against the right ones, in [0, 1].
        trouble: why right answers cannot be scored against; "" if they can.
        graded: whether there are scores between 0 and 1.
    """

    name: str
    score: Callable[[str, Sequence[str]], float]
    trouble: Callable[[Sequence[str]], str] = _any
    graded: bool = False


EXACT = Metric("exact", exact)
METRICS = {
    metric.name: metric
    for metric in (EXACT, Metric("vqa", vqa, _enough, graded=True), Metric("choice", choice, _letters))
}
