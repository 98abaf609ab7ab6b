"""Turns tokens into text as they come."""

from __future__ import annotations

from vtexport.models.prompt import Prompter


class TextStream:
    """The text of one answer, piece by piece."""

    def __init__(self, prompter: Prompter) -> None:
        self._prompter = prompter
        self._tokens: list[int] = []
        self._given = 0

    def add(self, token: int) -> str:
        """The text that `token` adds; empty while a character is incomplete."""
        self._tokens.append(token)
        text = self._prompter.decode(self._tokens)
        # A character may need several tokens; an incomplete one waits.
        return "" if text.endswith("\ufffd") else self._from(text)

    def rest(self) -> str:
        """The text that is left when all tokens have come."""
        return self._from(self._prompter.decode(self._tokens))

    def _from(self, text: str) -> str:
        piece = text[self._given :]
        self._given = len(text)
        return piece
