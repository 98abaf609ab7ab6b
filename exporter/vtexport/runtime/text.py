"""Tokens as they come -> text as it grows."""

from __future__ import annotations

from vtexport.models.prompt import Prompter


class TextStream:
    """The text of one answer, piece by piece."""

    def __init__(self, prompter: Prompter) -> None:
        self._prompter = prompter
        self._tokens: list[int] = []
        self._given = 0

    def add(self, token: int) -> str:
        """What `token` adds to the text; empty while a character is not whole yet."""
        self._tokens.append(token)
        text = self._prompter.decode(self._tokens)
        # A character may need several tokens: what is not whole yet waits.
        return "" if text.endswith("\ufffd") else self._from(text)

    def rest(self) -> str:
        """What is left when all tokens have come."""
        return self._from(self._prompter.decode(self._tokens))

    def _from(self, text: str) -> str:
        piece = text[self._given :]
        self._given = len(text)
        return piece
