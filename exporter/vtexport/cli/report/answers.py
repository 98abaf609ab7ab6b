"""The output of `vtexport run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
        for number, (text, pieces) in enumerate(zip(self._texts, self._pieces, strict=True), start=1):
            self._write(f"{number}. {''.join(pieces)}{text.rest()}")


def run_summary(answers: Sequence[Answer]) -> str:
    """One line on tokens and time; with `--keep auto` one per chosen keep ratio."""
    return "\n".join(
        _run_line([answer for answer in answers if answer.keep == keep])
        for keep in sorted({answer.keep for answer in answers})
    )


def _run_line(answers: Sequence[Answer]) -> str:
    tokens, times = answers[0].visual_tokens, answers[0].timings_ms
    step = "" if times["per_token"] is None else f", {times['per_token']:.1f} ms per token"
    spreads = ", ".join(f"{answer.spread:.1f}" for answer in answers if answer.spread is not None)
    chosen = f"keep {answers[0].keep:g} chosen (attention spread over {spreads} patches): " if spreads else ""
    return (
        f"{chosen}{tokens['mean']:g} of {tokens['total']:g} visual tokens; preprocess {times['preprocess']:.1f} ms, "
        f"vision {times['vision']:.1f} ms, prefill {times['prefill']:.1f} ms{step}"
    )
