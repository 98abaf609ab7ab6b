"""The parts of all reports: tables, lists of facts, paragraphs.

Each is whole at any width. Off a terminal a line is as long as what it says. On one that is narrower, lines are broken
at spaces only; where that does not do, a table becomes a list of its rows. No word and no figure is ever cut or broken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from vtexport.errors import printable

_GAP = 2
#: columns that a list's values get at least; where the terminal leaves fewer, they stand below their names
_VALUES = 30


class Whole(str):
    """Text to be copied, such as a path or a command: never broken into lines."""

    __slots__ = ()


class _Part:
    """Part of a report: lines that depend on the width alone."""

    def lines(self, width: int) -> list[Text]:
        """The lines for a terminal of `width` columns."""
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines(options.max_width):
            line.no_wrap, line.overflow = True, "ignore"
            yield line


class Paragraph(_Part):
    """Running text, of one or several lines."""

    def __init__(self, text: str, style: str = "") -> None:
        self._lines = [printable(line) for line in text.split("\n")]
        self._style = style

    def lines(self, width: int) -> list[Text]:
        return [Text(part, self._style) for line in self._lines for part in _broken(line, width)]


class Facts(_Part):
    """Names and values."""

    def __init__(self, rows: Sequence[tuple[str, str]]) -> None:
        self._rows = [(printable(name), _clean(value)) for name, value in rows]

    def lines(self, width: int) -> list[Text]:
        names = max((cell_len(name) for name, _ in self._rows), default=0)
        below = width - names - _GAP < _VALUES
        found = []
        for name, value in self._rows:
            room = width - (2 * _GAP if below else names + _GAP)
            parts = [value] if isinstance(value, Whole) else _broken(value, room)
            if below:
                found += [Text(name, "bold"), *(Text(" " * 2 * _GAP + part) for part in parts)]
                continue
            for number, part in enumerate(parts):
                head = name if number == 0 else ""
                found.append(Text.assemble((_padded(head, names), "bold"), " " * _GAP, part))
        return found


class Table(_Part):
    """Rows below headers; the first column stands left, the others right."""

    def __init__(self, *columns: str) -> None:
        self._rows = [[printable(column) for column in columns]]

    def add_row(self, *cells: str) -> None:
        """Add a row; it may be shorter than the table is wide."""
        row = [printable(cell) for cell in cells]
        self._rows.append(row + [""] * (len(self._rows[0]) - len(row)))

    def lines(self, width: int) -> list[Text]:
        widths = self._widths(width)
        return self._listed(width) if widths is None else list(self._aligned(widths))

    def _widths(self, width: int) -> list[int] | None:
        """The width of each column; None if the longest words do not fit side by side."""
        columns = list(zip(*self._rows, strict=True))
        full = [max(map(cell_len, column)) for column in columns]
        least = [max(cell_len(word) for cell in column for word in cell.split(" ")) for column in columns]
        room = width - _GAP * (len(columns) - 1)
        if sum(full) <= room:
            return full
        if sum(least) > room:
            return None
        # What is left goes to the columns that need the most, so that the fewest lines are broken.
        widths = least
        for _ in range(room - sum(least)):
            wanting = [want - has for want, has in zip(full, widths, strict=True)]
            widths[wanting.index(max(wanting))] += 1
        return widths

    def _aligned(self, widths: Sequence[int]) -> Iterator[Text]:
        for number, row in enumerate(self._rows):
            cells = [_broken(cell, room) for cell, room in zip(row, widths, strict=True)]
            height = max(map(len, cells))
            # Headers stand on the line of the first row, values beside the first line of their row's name.
            cells = [[""] * (height - len(cell)) + cell if number == 0 else cell for cell in cells]
            for place in range(height):
                parts = [cell[place] if place < len(cell) else "" for cell in cells]
                line = [
                    _padded(part, room, right=i > 0) for i, (part, room) in enumerate(zip(parts, widths, strict=True))
                ]
                yield Text((" " * _GAP).join(line).rstrip(), "bold" if number == 0 else "")

    def _listed(self, width: int) -> list[Text]:
        """Each row as a list of its cells, below its name."""
        (_, *headers), *rows = self._rows
        found: list[Text] = []
        for name, *cells in rows:
            named = [(header, cell) for header, cell in zip(headers, cells, strict=True) if cell]
            found += [Text(part, "bold") for part in _broken(name or self._rows[0][0], width)]
            for header, cell in named:
                found += [Text("  " + part) for part in _broken(f"{header}: {cell}" if header else cell, width - 2)]
        return found


def _clean(value: str) -> str:
    """Text from outside as a terminal may get it; what is to be copied stays `Whole`."""
    return Whole(printable(value)) if isinstance(value, Whole) else printable(value)


def _broken(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` columns, broken at spaces; a longer word gets a line of its own."""
    found, line = [], ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if line and cell_len(longer) > width:
            found.append(line)
            line = word
        else:
            line = longer
    return [*found, line]


def _padded(text: str, width: int, *, right: bool = False) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space
