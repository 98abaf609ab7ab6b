"""Chat templates: programs in Jinja that come with a model, rendered as transformers renders them, but within bounds."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace

from vtexport.errors import ModelError, first_line
from vtexport.models.sandbox import SIZE, WORK, Bounded, TooMuch

#: characters of a template
LENGTH = 1 << 18


class ChatTemplate:
    """The chat template `source`, compiled.

    Raises:
        ModelError: it is no template.
    """

    def __init__(self, source: str) -> None:
        functions: dict[str, Callable[..., Any]] = {
            "dict": lambda *args, **given: dict(*args, **given),
            "namespace": _Names,
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        self._bounded = Bounded([_Generation, loopcontrols], {"tojson": _tojson}, functions)
        self._lock = threading.Lock()
        try:
            if len(source) > LENGTH:
                raise TooMuch(f"it has {len(source)} characters")
            self._bounded.left = WORK
            self._template = self._bounded.from_string(source)
        except Exception as error:  # whatever the program leads Jinja to
            raise ModelError(
                f"the chat template is not one that Jinja reads ({first_line(error)}); get it again"
            ) from error

    def render(self, **given: Any) -> str:
        """The text that the template makes of `given`, JSON's types alone.

        Raises:
            TemplateError: it refuses them, fails, or does too much work.
            TypeError: it uses one of them as another type.
        """
        with self._lock:
            self._bounded.left = WORK
            pieces: list[str] = []
            length = 0
            try:
                for piece in self._template.generate(**given):
                    length += len(piece)
                    if length > SIZE:
                        raise TooMuch(f"it makes a text of more than {SIZE} characters")
                    pieces.append(piece)
            except (TemplateError, TypeError):
                raise
            except Exception as error:  # its own mistakes: a number too large, a part that is not there
                raise TemplateError(f"{type(error).__name__}: {first_line(error)}") from error
            return "".join(pieces)


class _Generation(Extension):
    """The tag `generation`, with which transformers marks answers; here its content alone counts."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Names(Namespace):
    """Jinja's `namespace`, but for names with an underscore in front."""

    def __init__(self, *args: Any, **given: Any) -> None:
        _check_names(dict(*args, **given))
        super().__init__(*args, **given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_names({name: value})
        super().__setitem__(name, value)


def _check_names(names: Iterable[Any]) -> None:
    if any(isinstance(name, str) and name.startswith("_") for name in names):
        raise SecurityError("a namespace has no names with an underscore in front")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: without HTML's escapes."""
    if any(len(one) > 16 for one in separators or ()):
        raise TooMuch("it separates JSON by long texts")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces, length = [], 0
    for piece in encoder.iterencode(value):
        length += len(piece)
        if length > SIZE:
            raise TooMuch(f"it makes a value of more than {SIZE} characters")
        pieces.append(piece)
    return "".join(pieces)
