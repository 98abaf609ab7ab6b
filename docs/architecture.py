"""Draw the packages of vtexport and what they import, as docs/architecture.svg.

    python docs/architecture.py [--check]

Reads every import in exporter/vtexport, those inside functions and for type checking included, and puts each package
on a row below all that import it. An arrow means "imports"; arrows that follow from others are left out, and so are
those to the modules that nearly every package imports (`COMMON`), which stand in a row at the bottom. With --check
nothing is written, and the exit code is 1 if the picture is out of date. Imports that run in a circle are an error.
"""

from __future__ import annotations

import argparse
import ast
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "exporter" / "vtexport"
PICTURE = Path(__file__).with_name("architecture.svg")
COMMON = ("errors", "options", "arrays", "progress")
#: the package's own __init__.py: the public API
API = "vtexport"
WIDTH, MARGIN, BOX, GAP, LANE = 1000, 24, 66, 32, 16
STYLE = """text { font-family: system-ui, Helvetica, Arial, sans-serif; fill: #1a1a1a; text-anchor: middle }
.name { font-weight: 600; font-size: 15px }
.about { font-size: 11.5px; fill: #444 }
.note { font-size: 12px; fill: #444 }
rect.package { fill: #eaf1fb; stroke: #3a6ea5 }
rect.common { fill: #f1f1f1; stroke: #888 }
path { fill: none; stroke: #555; stroke-width: 1.2; marker-end: url(#head) }"""

Edges = dict[str, set[str]]


def part_of(path: Path) -> str:
    """The package that a file belongs to: a folder, a module at the top, or the public API."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    # `python -m vtexport` is the command line.
    return {"__init__": API, "__main__": "cli"}.get(first, first)


def imported(path: Path) -> Iterator[str]:
    """Names of vtexport's modules that a file imports, wherever in it."""
    api = path == PACKAGE / "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        # The public API may name the modules that it loads when they are asked for.
        if api and isinstance(node, ast.Constant) and re.fullmatch(rf"{API}(\.\w+)+", str(node.value)):
            yield str(node.value)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == API:
            yield from (f"{API}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


def read_edges() -> Edges:
    """For each package the others that it imports."""
    edges: Edges = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        edges.setdefault(part_of(path), set())
    for path in sorted(PACKAGE.rglob("*.py")):
        own = part_of(path)
        names = (name.split(".")[1] for name in imported(path) if name.startswith(f"{API}."))
        # A name that is no module is one of the public API.
        edges[own] |= {name if name in edges else API for name in names} - {own}
    return edges


def depths(edges: Mapping[str, set[str]]) -> dict[str, int]:
    """How many packages lie below each one, on the longest way down.

    Raises:
        SystemExit: imports run in a circle.
    """
    found: dict[str, int] = {}

    def depth(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise SystemExit(f"imports run in a circle: {' -> '.join((*above[above.index(name) :], name))}")
        if name not in found:
            found[name] = 1 + max((depth(below, (*above, name)) for below in sorted(edges[name])), default=-1)
        return found[name]

    for name in sorted(edges):
        depth(name, ())
    return found


def direct(edges: Edges) -> Edges:
    """`edges` without those that follow from others."""

    def reach(name: str) -> set[str]:
        return edges[name].union(*(reach(below) for below in edges[name]))

    return {name: belows - set().union(*(reach(below) for below in belows)) for name, belows in edges.items()}


@dataclass
class Row:
    """Boxes and passing arrows from left to right; a passing arrow is a pair (from, to)."""

    items: list[str | tuple[str, str]] = field(default_factory=list)


def place(edges: Edges) -> tuple[list[Row], Edges]:
    """Rows from the top, and the arrows to draw."""
    level, arrows = depths(edges), direct(edges)
    top = max(level.values())
    rows = [Row() for _ in range(top + 1)]
    for name in sorted(edges):
        rows[top - level[name]].items.append(name)
        for below in sorted(arrows[name]):
            for between in range(level[below] + 1, level[name]):
                rows[top - between].items.append((name, below))
    for above, row in pairwise(rows):
        spots = {item: number for number, item in enumerate(above.items)}

        def spot(item: str | tuple[str, str], spots: dict[str | tuple[str, str], int] = spots) -> tuple[float, str]:
            if isinstance(item, tuple):
                sources = [spots.get(item, spots.get(item[0], 0))]
            else:
                sources = [n for other, n in spots.items() if _leads(other, item, arrows)]
            return sum(sources) / max(1, len(sources)), str(item)

        row.items.sort(key=spot)
    return rows, arrows


def _leads(above: str | tuple[str, str], name: str, arrows: Edges) -> bool:
    """Whether an arrow leads from an item of the row above to `name`."""
    return above[1] == name if isinstance(above, tuple) else name in arrows[above]


def about(name: str) -> str:
    """The first line of a package's docstring."""
    if name == API:
        return "The public API"
    folder = PACKAGE / name
    path = folder / "__init__.py" if folder.is_dir() else PACKAGE / f"{name}.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".")


def draw() -> str:
    """The picture, as SVG."""
    found = read_edges()
    edges = {name: belows - set(COMMON) for name, belows in found.items() if name not in COMMON}
    rows, arrows = place(edges)
    boxes: list[str] = []
    centre: dict[tuple[int, str | tuple[str, str]], float] = {}
    for number, row in enumerate(rows):
        names = [item for item in row.items if isinstance(item, str)]
        lanes = len(row.items) - len(names)
        width = min(430.0, (WIDTH - 2 * MARGIN - lanes * 2 * LANE - (len(row.items) - 1) * LANE) / max(1, len(names)))
        used = width * len(names) + lanes * 2 * LANE + (len(row.items) - 1) * LANE
        left = (WIDTH - used) / 2
        for item in row.items:
            own = width if isinstance(item, str) else 2 * LANE
            centre[number, item] = left + own / 2
            if isinstance(item, str):
                boxes += _box(item, left, _top(number), own, "package")
            left += own + LANE
    lines = [_arrow(name, below, rows, centre) for name in sorted(arrows) for below in sorted(arrows[name])]
    height = _top(len(rows)) + BOX + 2 * MARGIN
    share = (WIDTH - 2 * MARGIN - (len(COMMON) - 1) * LANE) / len(COMMON)
    for number, name in enumerate(COMMON):
        boxes += _box(name, MARGIN + number * (share + LANE), _top(len(rows)), share, "common")
    note = "An arrow means “imports”; arrows that follow from others, and all to the bottom row, are left out."
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
            f"<title>The packages of vtexport</title>\n<style>{STYLE}</style>",
            f'<defs>{head}<polygon points="0,0 8,4 0,8" fill="#555"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            *lines,
            *boxes,
            f'<text class="note" x="{WIDTH / 2:g}" y="{height - MARGIN / 2:g}">{note}</text>',
            "</svg>\n",
        ]
    )


def _top(row: int) -> int:
    return MARGIN + row * (BOX + GAP)


def _box(name: str, left: float, top: float, width: float, kind: str) -> list[str]:
    middle = left + width / 2
    lines = textwrap.wrap(about(name), int(width / 6.7), max_lines=2, placeholder=" …")
    first = top + 34 - 8 * (len(lines) - 2)
    return [
        f'<rect class="{kind}" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BOX}" rx="6"/>',
        f'<text class="name" x="{middle:.1f}" y="{first - 14}">{name}</text>',
        *(
            f'<text class="about" x="{middle:.1f}" y="{first + 4 + 15 * number}">{escape(line)}</text>'
            for number, line in enumerate(lines)
        ),
    ]


def _arrow(name: str, below: str, rows: list[Row], centre: Mapping[tuple[int, str | tuple[str, str]], float]) -> str:
    """A line from the bottom of one box, through its lanes, to the top of another."""
    start = next(number for number, row in enumerate(rows) if name in row.items)
    end = next(number for number, row in enumerate(rows) if below in row.items)
    x, y = centre[start, name], _top(start) + BOX
    path = f"M{x:.1f},{y}"
    for number in range(start + 1, end + 1):
        to = centre[number, (name, below) if number < end else below]
        path += f" C{x:.1f},{y + GAP / 2:g} {to:.1f},{_top(number) - GAP / 2:g} {to:.1f},{_top(number)}"
        x, y = to, _top(number) + BOX
        if number < end:
            path += f" V{y}"
    return f'<path d="{path}"/>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the picture is out of date")
    picture = draw()
    if not parser.parse_args().check:
        PICTURE.write_text(picture, encoding="utf-8")
    elif not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != picture:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
