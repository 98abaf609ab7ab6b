"""How figures are written, in every report, page and plot alike, and as JSON.

Figures are rounded to what a reader uses: none is 0.00 or 100.0% that is not so, none has an exponent, and from 1,000 on
they have separators.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

#: units of sizes, in powers of 1000, each with the decimals that it is given
_UNITS = (("B", 0), ("kB", 1), ("MB", 1), ("GB", 2), ("TB", 2))
#: what stands for a figure that is none
_NONE = "n/a"


def number(value: float, digits: int = 4) -> str:
    """A count or a mean: whole numbers whole, others with `digits` significant ones but all before the point."""
    if not math.isfinite(value):
        return _NONE
    if value == int(value):
        return f"{int(value):,}"
    # Rounding first shows how many digits stand before the point: 9.9996 has two of them.
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def milliseconds(value: float) -> str:
    """A time: two decimals below 100, fewer above, and as many as it takes below 0.1."""
    return _scaled(value)


def times(value: float, sign: str = "x") -> str:
    """A ratio, with `sign` behind it."""
    text = _scaled(value)
    return text if text == _NONE else text + sign


def percent(part: float, decimals: int = 1) -> str:
    """A share, 1.0 being 100%; 0% and 100% are written only where nothing or all is meant."""
    if not math.isfinite(part):
        return _NONE
    if part in (0.0, 1.0):
        return f"{part:.0%}" if decimals == 0 else f"{part:.{decimals}%}"
    least = 10.0 ** -(decimals + 2)
    if 0 < part < least:
        return f"<{least:.{decimals}%}"
    if 1 - least < part < 1:
        return f">{1 - least:.{decimals}%}"
    return f"{part:,.{decimals}%}"


def fixed(value: float, decimals: int = 1) -> str:
    """A figure of a column whose figures have equally many decimals."""
    return f"{value:,.{decimals}f}" if math.isfinite(value) else _NONE


def probability(value: float) -> str:
    """A p value: two significant digits from 0.0001 on."""
    if not math.isfinite(value):
        return _NONE
    return f"{value:.2g}" if value >= 0.0001 else "<0.0001"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    if not math.isfinite(difference):
        return _NONE
    text = f"{100 * difference:+.1f}"
    return text if float(text) else "0.0"


def size(count: int) -> str:
    """Bytes, in the decimal unit (1 MB is a million bytes) that leaves one to three digits before the point."""
    scaled = float(count)
    for unit, decimals in _UNITS:
        text = f"{scaled:,.{decimals}f}"
        if abs(float(text.replace(",", ""))) < 1000 or unit == _UNITS[-1][0]:
            return f"{text} {unit}"
        scaled /= 1000
    raise AssertionError("the last unit takes every size")


def seconds(value: float) -> str:
    """A time: in seconds below 100, in minutes below two hours, else in hours."""
    if value < 99.95:
        return f"{value:.1f} s" if value >= 0.05 else "<0.1 s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{value / 3600:.1f} h"


def listed(options: Mapping[str, object], between: str = "; ") -> str:
    """Options with their values; those that are empty are left out."""
    shown = {True: "yes", False: "no"}
    return between.join(
        f"{name.replace('_', ' ')} {shown[value] if isinstance(value, bool) else value}"
        for name, value in options.items()
        if value != "" and value is not None
    )


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that every reader takes: what is not a number (NaN, infinity) becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _scaled(value: float) -> str:
    """Two decimals below 100, one below 1,000, none above; below 0.1, two significant digits."""
    if not math.isfinite(value):
        return _NONE
    if value == 0:
        return "0"
    if abs(value) < 0.0995:
        return f"{value:.{1 - math.floor(math.log10(abs(value)))}f}"
    for limit, decimals in ((99.995, 2), (999.95, 1)):
        if abs(value) < limit:
            return f"{value:.{decimals}f}"
    return f"{value:,.0f}"
