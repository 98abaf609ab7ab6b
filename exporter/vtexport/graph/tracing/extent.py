"""Extents of tensors that are known only when a graph runs, such as the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

#: the number that an extent is as an `int`; no real one is as large, so one that is taken for a number can be found
STANDS_FOR = 1 << 40


class Extent(int):
    """A dynamic extent: a sum of named ones with whole coefficients, and a constant, such as `text + 144`.

    It is an `int` only so that PyTorch's functions take it as a size. Arithmetic whose result is not such a sum is an
    error, and so is asking whether it is greater or smaller than something.

    Attributes:
        terms: coefficients by name, none of them zero.
        constant: the constant of the sum.
    """

    terms: Mapping[str, int]
    constant: int

    def __new__(cls, terms: Mapping[str, int], constant: int = 0) -> Extent:
        extent = super().__new__(cls, STANDS_FOR)
        extent.terms = dict(sorted(terms.items()))
        extent.constant = constant
        return extent

    @classmethod
    def named(cls, name: str) -> Extent:
        """The extent that is called `name`."""
        return cls({name: 1})

    def __add__(self, other: int) -> int:
        if not isinstance(other, int):
            return NotImplemented
        terms, constant = _parts(other)
        names = {*self.terms, *terms}
        return _made({name: self.terms.get(name, 0) + terms.get(name, 0) for name in names}, self.constant + constant)

    __radd__ = __add__

    def __neg__(self) -> int:
        return self * -1

    def __sub__(self, other: int) -> int:
        return self + -other if isinstance(other, int) else NotImplemented

    def __rsub__(self, other: int) -> int:
        return other + -self

    def __mul__(self, factor: int) -> int:
        if not isinstance(factor, int):
            return NotImplemented
        if isinstance(factor, Extent):
            raise TypeError(f"the extent ({self}) * ({factor}) is no sum")
        return _made({name: factor * number for name, number in self.terms.items()}, factor * self.constant)

    __rmul__ = __mul__

    def __floordiv__(self, divisor: int) -> int:
        if isinstance(divisor, Extent):
            name, number = next(iter(divisor.terms.items()))
            quotient = self.terms.get(name, 0) // number
            if divisor * quotient == self:
                return quotient
        elif not any(number % divisor for number in (*self.terms.values(), self.constant)):
            return _made({name: number // divisor for name, number in self.terms.items()}, self.constant // divisor)
        raise TypeError(f"the extent {self} is not always a multiple of {divisor}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extent) and (self.terms, self.constant) == (other.terms, other.constant)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((tuple(self.terms.items()), self.constant))

    def _unknown(self, *_: object) -> NoReturn:
        raise TypeError(f"the extent {self} is dynamic and supports only sums and multiples")

    __lt__ = __le__ = __gt__ = __ge__ = __mod__ = __rmod__ = __rfloordiv__ = __truediv__ = __pow__ = _unknown

    def __repr__(self) -> str:
        terms = [name if number == 1 else f"{number}*{name}" for name, number in self.terms.items()]
        return " + ".join([*terms, str(self.constant)] if self.constant else terms)

    __str__ = __repr__


def _parts(number: int) -> tuple[Mapping[str, int], int]:
    return (number.terms, number.constant) if isinstance(number, Extent) else ({}, number)


def _made(terms: Mapping[str, int], constant: int) -> int:
    left = {name: number for name, number in terms.items() if number}
    return Extent(left, constant) if left else constant
