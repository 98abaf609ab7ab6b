"""Captions in pictures: text of any length and script, in the fonts that this machine has."""

from __future__ import annotations

import subprocess
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vtexport.errors import printable

#: line height and baseline, in sizes of the font
_LINE, _BASE = 1.375, 1.06
#: asks for fonts at most, in one caption
_ASKED = 12
#: no font has a glyph for this, so that it is drawn as the box of what is missing
_NO_CHARACTER = "\U0010fffe"
#: text in one font
Run = tuple[str, Any]


class Caption:
    """Text in lines of at most a number of pixels.

    Characters that no font here can draw are counted in its place, never drawn as boxes.

    Args:
        text: any text.
        width: pixels per line.
        size: of the font, in pixels.
    """

    def __init__(self, text: str, width: int, size: int = 16) -> None:
        self._size = size
        text = "\n".join(printable(line, keep="\t") for line in unicodedata.normalize("NFC", text).splitlines())
        self._fonts = _fonts_for(text, size)
        self._lines = [line for paragraph in text.split("\n") for line in self._broken(paragraph, width)]

    @property
    def height(self) -> int:
        """Pixels that the lines take."""
        return round(len(self._lines) * self._size * _LINE)

    def draw(self, picture: Any, left: int, top: int, fill: str = "black") -> None:
        """Draw it onto a PIL image."""
        from PIL import ImageDraw

        canvas = ImageDraw.Draw(picture)
        for number, line in enumerate(self._lines):
            across, base = float(left), top + round((number * _LINE + _BASE) * self._size)
            for text, font in line:
                canvas.text((across, base), text, fill=fill, font=font, anchor="ls")
                across += font.getlength(text)

    def _broken(self, text: str, width: int) -> Iterator[list[Run]]:
        """The lines of a paragraph."""
        line = ""
        for piece in self._pieces(text, width):
            if line and self._length(line + piece.rstrip()) > width:
                yield self._runs(line.rstrip())
                line = piece.lstrip()
            else:
                line += piece
        yield self._runs(line.rstrip())

    def _pieces(self, text: str, width: int) -> Iterator[str]:
        """Parts of `text` between which a line may be broken, none wider than a line."""
        for word in _words(self._readable(text)):
            # A word that is too long is broken between any two characters.
            part, across = "", 0.0
            for character in word if len(word) > 1 else ():
                step = self._length(character)
                if part and across + step > width and not character.isspace():
                    yield part
                    part, across = "", 0.0
                part, across = part + character, across + step
            yield part or word

    def _readable(self, text: str) -> str:
        """`text` with the number of characters in place of those that no font has."""

        def said(missing: str) -> str:
            number = len(missing)
            return f"[{number:,} character{'s' if number > 1 else ''} that no font here can draw]"

        parts, missing = [], ""
        for character in text:
            if any(_draws(font, character) for font in self._fonts):
                parts += [said(missing), character] if missing else [character]
                missing = ""
            else:
                missing += character
        return "".join([*parts, said(missing)] if missing else parts)

    def _length(self, text: str) -> float:
        return sum(float(font.getlength(part)) for part, font in self._runs(text))

    def _runs(self, text: str) -> list[Run]:
        """`text` in one font if one has it all, else in runs, each in the first font that has it."""
        for font in self._fonts:
            if all(_draws(font, character) for character in text):
                return [(text, font)] if text else []
        runs: list[Run] = []
        for character in text:
            able = [font for font in self._fonts if _draws(font, character)]
            if runs and (runs[-1][1] in able):
                runs[-1] = (runs[-1][0] + character, runs[-1][1])
            else:
                runs.append((character, able[0]))
        return runs


def _words(text: str) -> Iterator[str]:
    """Words with the spaces behind them, and wide characters one by one."""
    word = ""
    for character in text:
        wide = unicodedata.east_asian_width(character) in "WF"
        # A line may be broken behind spaces and around wide characters, as Chinese ones are.
        if word and not character.isspace() and (wide or word[-1].isspace() or _wide(word)):
            yield word
            word = ""
        word += character
    if word:
        yield word


def _wide(word: str) -> bool:
    return unicodedata.east_asian_width(word[0]) in "WF"


def _fonts_for(text: str, size: int) -> list[Any]:
    """Fonts that together draw what can be drawn of `text` here: Pillow's own first, then those of the machine."""
    from PIL import ImageFont

    fonts: list[Any] = [ImageFont.load_default(size)]
    missing = sorted({character for character in text if not _draws(fonts[0], character)})
    # One font for all that is missing looks best; else one for each of its scripts.
    for asked in range(_ASKED):
        if not missing:
            break
        for path, face in _files("".join(missing if asked == 0 else missing[:1])):
            font = _opened(path, face, size)
            if font is not None and any(_draws(font, character) for character in missing):
                fonts.append(font)
                missing = [character for character in missing if not _draws(font, character)]
                break
        else:
            missing = missing[1:] if asked else missing
    # Lines that the first font could draw alone would else look unlike the others.
    return [*fonts[1:], fonts[0]]


def _opened(path: str, face: int, size: int) -> Any | None:
    from PIL import ImageFont

    try:
        return ImageFont.truetype(path, size, face)
    except (OSError, ValueError):
        # Fonts of bitmaps have certain sizes only.
        return None


@lru_cache(maxsize=64)
def _files(characters: str) -> Sequence[tuple[str, int]]:
    """Font files, with the number of the face in them, that fontconfig thinks best for `characters`."""
    codes = " ".join(f"{ord(character):x}" for character in characters[:64])
    command = ["fc-match", "--sort", "--format", "%{file}\t%{index}\n", f"sans:charset={codes}"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=5, check=True, encoding="utf-8", errors="replace")
        found = [line.split("\t") for line in done.stdout.splitlines()[:8]]
        return [(file, int(index)) for file, index in found]
    except (OSError, ValueError, subprocess.SubprocessError):
        # Without fontconfig there is still the font that comes with matplotlib, of the extra `plots`.
        plots = find_spec("matplotlib")
        if plots is None or plots.origin is None:
            return []
        return [(str(Path(plots.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"), 0)]


@lru_cache(maxsize=1 << 14)
def _draws(font: Any, character: str) -> bool:
    """Whether `font` has a glyph for `character`."""
    from PIL import features

    category = unicodedata.category(character)
    if character.isspace():
        return True
    shapes = bool(features.check("raqm") and features.check("fribidi"))
    if category in ("Cf", "Mn", "Me"):
        # Joiners and marks are part of the glyph before them, if text is shaped at all.
        return shapes
    if unicodedata.bidirectional(character) in ("R", "AL") and not shapes:
        return False
    mask, none = font.getmask(character), font.getmask(_NO_CHARACTER)
    return (mask.size, bytes(mask)) != (none.size, bytes(none))
