"""Jinja's sandbox, bounded in time and memory: what runs the chat templates that come with models.

The sandbox itself keeps a template from files and from Python's insides, but lets it loop for days or make a text of
terabytes. So here it works for pay. Every filter, test, call, operator, loop
and output first pays for its operands' sizes from what `WORK` grants a rendering, and what can make a value that is
larger than its operands (products, paddings, replacements) is refused before it does. Builtin methods that are not
listed cannot be called. Each step's cost is then in proportion to what it pays, and no value is larger than `SIZE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from types import BuiltinMethodType, MethodDescriptorType, MethodWrapperType
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

#: what a rendering may spend: the characters that its steps go through, and a fee for each step; a few seconds at most
WORK = 1 << 26
#: characters of a value, parts of its parts included
SIZE = 1 << 22
# What a step and an element cost, in characters.
_FEE, _ELEMENT = 256, 32
_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(
        [
            "capitalize",
            "casefold",
            "center",
            "count",
            "endswith",
            "expandtabs",
            "find",
            "index",
            "isalnum",
            "isalpha",
            "isascii",
            "isdecimal",
            "isdigit",
            "islower",
            "isnumeric",
            "isspace",
            "istitle",
            "isupper",
            "join",
            "ljust",
            "lower",
            "lstrip",
            "partition",
            "removeprefix",
            "removesuffix",
            "replace",
            "rfind",
            "rindex",
            "rjust",
            "rpartition",
            "rsplit",
            "rstrip",
            "split",
            "splitlines",
            "startswith",
            "strip",
            "swapcase",
            "title",
            "upper",
            "zfill",
        ]
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
}
# Wide enough for any template's columns, and too narrow to fill a memory.
_WIDTH = 1000
_WIDE = re.compile(r"[0-9]{4}|\*|\{[^{}]*:[^{}]*\{")
# Filters that no chat template needs, and whose cost is not in proportion to their operands' sizes.
_DROPPED = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
# Digits of numbers, which few templates have any of.
_BITS = 4096


class TooMuch(TemplateError):
    """A template does too much work, or makes too large a value."""


class _Paying(NodeTransformer):
    """Lets the parts of a template that Jinja runs without asking pay too: loops, comparisons, outputs, literals."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered("each of", node.iter)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered("paid", node.expr)
        for operand in node.ops:
            operand.expr = _filtered("paid", operand.expr)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        # Fixed text pays as well: it may stand in a loop, whose output is a variable's value.
        node.nodes = [_filtered("paid", part) for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("joined text", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filtered("paid", node.node)
        elif not isinstance(node.arg, nodes.Const):
            node.arg = _filtered("paid", node.arg)
        return node

    def _literal(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        # A tuple may also be the names that something is assigned to.
        return node if getattr(node, "ctx", "load") != "load" else _filtered("paid", node)

    visit_List = visit_Tuple = visit_Dict = _literal


def _filtered(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which every step pays.

    Args:
        extensions: more statements.
        filters: more filters.
        functions: what templates may call besides Jinja's `range`, `cycler` and `joiner`.

    Attributes:
        left: what may still be spent; whoever renders a template puts `WORK` there before.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(
        self,
        extensions: Sequence[type[Extension]],
        filters: Mapping[str, Callable[..., Any]],
        functions: Mapping[str, Callable[..., Any]],
    ) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, cache_size=0)
        self.left = WORK
        kept = {name: made for name, made in {**self.filters, **filters}.items() if name not in _DROPPED}
        self.filters = {name: self._priced(name, made) for name, made in kept.items()}
        # Filters that ask for the context are not computed once and for all when a template is compiled.
        self.filters["paid"] = pass_context(lambda _, value: self.pay(value))
        self.filters["each of"] = pass_context(lambda _, values: self._each(values))
        self.filters["joined text"] = pass_context(lambda _, parts: "".join(map(str, self.pay(parts))))
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: self._priced(name, made) for name, made in tests.items()}
        self.globals = {**{name: self.globals[name] for name in ("range", "cycler", "joiner")}, **functions}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed: nodes.Template = _Paying().visit(super()._parse(source, name, filename))
        return parsed

    def pay(self, value: Any) -> Any:
        """`value`, for whose size the template has paid."""
        self.make(_size(value))
        return value

    def make(self, size: int) -> None:
        """Pay for a value of `size` characters or elements."""
        if size > SIZE:
            raise TooMuch(f"it makes a value of more than {SIZE} characters")
        self.work(size)

    def work(self, size: int) -> None:
        """Pay for going through `size` characters or elements."""
        self.left -= size + _FEE
        if self.left < 0:
            raise TooMuch("it does more work than a prompt is worth")

    def _each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.work(0)
            yield value

    def _priced(self, name: str, made: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test that its operands are paid for, and its result."""
        # Before the operands, some get the context.
        first = int(hasattr(made, "jinja_pass_arg"))

        @wraps(made)
        def priced(*args: Any, **given: Any) -> Any:
            operands = self._charged(name, args[first:], given)
            return self.pay(made(*args[:first], *operands, **given))

        return priced

    def _charged(self, name: str, args: tuple[Any, ...], given: Mapping[str, Any]) -> tuple[Any, ...]:
        """The operands `args` of a step; it is refused if it would make too much of them."""
        if name == "join" and args:
            # How many there are decides how often what stands between them occurs.
            args = tuple(one if isinstance(one, _SIZED) else list(self._each(one)) for one in args)
        operands = (*args, *given.values())
        sizes = [_size(self.pay(one)) for one in operands]
        most = max((abs(one) for one in operands if isinstance(one, int | float)), default=0)
        if name in ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "tojson", "round") and most > _WIDTH:
            raise TooMuch(f"it pads to {most} places")
        if name == "replace" and len(operands) > 2:
            whole = str(operands[0])
            times = whole.count(str(args[1])) if len(args) > 2 else len(whole) + 1
            self.make(times * max(len(str(one)) for one in operands[1:]))
        elif name == "join":
            self.make(
                sum(len(one) for one in operands if isinstance(one, str)) * max(map(_length, operands), default=0)
            )
        elif name in ("expandtabs", "indent"):
            self.make(sizes[0] * int(max([most, 8, *sizes[1:]])))
        elif name in ("strip", "lstrip", "rstrip", "trim") and max(sizes[1:], default=0) > 16:
            self.work(sizes[0] * max(sizes[1:]))
        elif name in ("batch", "slice"):
            self.make(int(most))
        elif name == "sum" and any(not isinstance(one, int | float | str) for one in operands[1:]):
            raise TooMuch("it adds up lists")
        elif name == "format" and args:
            self._check_form(str(args[0]), "%", sizes)
        return args

    def _check_form(self, form: str, sign: str, sizes: Iterable[int]) -> None:
        """Refuse to format operands of `sizes` by `form` if the result is padded, or too large."""
        if _WIDE.search(form):
            raise TooMuch("it pads what it formats")
        self.make(form.count(sign) * max(sizes, default=0))

    def call(self, context: Any, obj: Any, *args: Any, **given: Any) -> Any:
        """A call in a template."""
        owner, method = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if any(obj is one for one in self.globals.values()) or not isinstance(obj, _BUILTIN):
            self._charged("", args, given)
        elif method in _METHODS.get(type(owner), ()):
            _, *args = self._charged(method, (owner, *args), given)  # type: ignore[assignment]
        else:
            raise SecurityError(f"{method} cannot be called in a chat template")
        return self.pay(super().call(context, obj, *args, **given))

    def wrap_str_format(self, value: Any) -> Any:
        """`str.format`, if `value` is that method of a text, so that it pays."""
        formats = super().wrap_str_format(value)
        if formats is None:
            return None

        def paying(*args: Any, **given: Any) -> Any:
            self._check_form(value.__self__, "{", [_size(one) for one in (*args, *given.values())])
            return formats(*args, **given)

        return paying

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator in a template."""
        sizes = [_size(self.pay(one)) for one in (left, right)]
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and (not numbers or abs(right) > _WIDTH or sizes[0] > 8):
            raise TooMuch("it raises to a power")
        if operator == "*" and not numbers:
            times = next((one for one in (left, right) if isinstance(one, int)), 0)
            self.make(max(sizes) * max(0, times))
        if operator == "%" and isinstance(left, str):
            self._check_form(left, "%", sizes[1:])
        return self.pay(super().call_binop(context, operator, left, right))


_SIZED = (str, list, tuple, dict, int, float, bool, type(None), range)
_BUILTIN = (BuiltinMethodType, MethodWrapperType, MethodDescriptorType, type)
_VIEWS: Any = (type({}.keys()), type({}.values()), type({}.items()))
_PARTS: tuple[type[Any], ...] = (list, tuple, set, frozenset, *_VIEWS)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict | range) else 1


def _size(value: Any) -> int:
    """Characters and elements of `value` and of its parts, which may occur many times; no more are counted than refused."""
    size, rest = 0, [value]
    while rest and size <= SIZE:
        one = rest.pop()
        if isinstance(one, Namespace):
            one = object.__getattribute__(one, "_Namespace__attrs")
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, dict):
            size += 2 * _ELEMENT * len(one)
            rest += [*one, *one.values()]
        elif isinstance(one, _PARTS):
            size += _ELEMENT * len(one)
            rest += one
        elif isinstance(one, int) and one.bit_length() > _BITS:
            raise TooMuch("it makes a huge number")
        size += 1
    return size
