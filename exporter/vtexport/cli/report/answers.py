"""The output of `vtexport run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vtexport.cli.report.layout import Paragraph
from vtexport.figures import milliseconds, number
from vtexport.models.prompt import Prompter
from vtexport.runtime.answer import Answer
from vtexport.runtime.text import TextStream


class Printer:
    """Prints answers as tokens come: a single one as it grows, a batch row by row at the end."""

    def __init__(self, prompter: Prompter, rows: int, write: Callable[..., Any]) -> None:
        self._write = write
        self._texts = [TextStream(prompter) for _ in range(rows)]
        self._pieces: list[list[str]] = [[] for _ in range(rows)]

    def add(self, row: int, token: int) -> None:
        """Take the next token of `row`."""
        piece = self._texts[row].add(token)
        self._pieces[row].append(piece)
        if len(self._texts) == 1:
            self._write(piece, nl=False)

    def close(self) -> None:
        """Print what is left when all tokens have come."""
        if len(self._texts) == 1:
            self._write(self._texts[0].rest())
            return
        for row, (text, pieces) in enumerate(zip(self._texts, self._pieces, strict=True), start=1):
            self._write(f"{row}. {''.join(pieces)}{text.rest()}")


def run_summary(answers: Sequence[Answer]) -> Paragraph:
    """One line on tokens and time; with `--keep auto` one per chosen keep ratio."""
    lines = [
        _run_line([answer for answer in answers if answer.keep == keep])
        for keep in sorted({answer.keep for answer in answers})
    ]
    return Paragraph("\n".join(lines), "dim")


def _run_line(answers: Sequence[Answer]) -> str:
    tokens, times = answers[0].visual_tokens, answers[0].timings_ms
    step = "" if times["per_token"] is None else f", {_time(times['per_token'])} per token"
    spreads = ", ".join(number(answer.spread) for answer in answers if answer.spread is not None)
    chosen = f"keep {number(answers[0].keep)} chosen (attention spread over {spreads} patches): " if spreads else ""
    stages = ", ".join(f"{stage} {_time(times[stage])}" for stage in ("preprocess", "vision", "prefill"))
    return f"{chosen}{number(tokens['mean'])} of {number(tokens['total'])} visual tokens; {stages}{step}"


def _time(spent: float | None) -> str:
    return "" if spent is None else f"{milliseconds(spent)} ms"
