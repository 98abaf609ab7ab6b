"""Arguments and flags that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
import cloup


class Finite(click.FloatRange):
    """A number within a range; NaN, which no comparison refuses, and infinity are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a number of that range.", param, ctx)
        return number


#: tokens, prompts or runs: as many as anyone can mean, so that a slip of the hand is told at once
COUNT = click.IntRange(1, 1 << 20)
PATH = click.Path(path_type=Path)
BUNDLE = cloup.argument("bundle", metavar="DIR", type=PATH, help="A bundle: the folder that vtexport build wrote.")
RANKING = cloup.option("--ranking-from", type=PATH, help="Bundle that ranks visual tokens, for method sgl.")
JSON = cloup.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
