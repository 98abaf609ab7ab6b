"""Arguments and flags that several commands share."""

from __future__ import annotations

from pathlib import Path

import click
import cloup

PATH = click.Path(path_type=Path)
BUNDLE = cloup.argument("bundle", metavar="DIR", type=PATH, help="A bundle: the folder that vtexport build wrote.")
RANKING = cloup.option("--ranking-from", type=PATH, help="Bundle that ranks visual tokens, for method sgl.")
JSON = cloup.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
