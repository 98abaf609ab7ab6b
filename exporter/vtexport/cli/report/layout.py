"""The parts of all reports: tables, lists of facts, sizes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text


def make_table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def facts(rows: Sequence[tuple[str, str]]) -> RenderableType:
    """Names and values, one unwrapped line each, so that paths and commands can be copied whole."""
    width = max(len(name) for name, _ in rows)
    lines = [Text.assemble((name.ljust(width), "bold"), "  ", value) for name, value in rows]
    return Text("\n", no_wrap=True, overflow="ignore").join(lines)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
