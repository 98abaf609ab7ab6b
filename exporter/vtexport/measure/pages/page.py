"""What all pages share: the templates' environment and the file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from vtexport import figures
from vtexport.errors import InputError
from vtexport.writing import check_file

SUFFIX = ".html"
_TEMPLATES = Path(__file__).parent


def is_page(path: Path) -> bool:
    """Whether the suffix of `path` asks for a page."""
    return path.suffix.lower() == SUFFIX


def check_page(path: Path, flag: str, inputs: Iterable[Path] = ()) -> None:
    """Refuse, before any work, a file that cannot become a page; for the arguments see `vtexport.writing.check_file`.

    Raises:
        InputError: its suffix is not .html, or see `check_file`.
        StorageError: see `check_file`.
    """
    if not is_page(path):
        raise InputError(f"{path}: not the name of a page; give a {flag} that ends in {SUFFIX}")
    check_file(path, flag, inputs)


def rendered(template: str, values: Mapping[str, Any], script: str = "") -> str:
    """The page that `template` makes of `values`, with the file `script` in it if one is named.

    Text in `values` is escaped. The page's own policy forbids every request, and every script but that one.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Prompts, answers and paths come from outside: whatever is put into a page is text, never markup.
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (figures.milliseconds, figures.percent, figures.size, times, share, figures.listed, short)
    environment.filters.update({function.__name__: function for function in filters}, significant=figures.number)
    code = (_TEMPLATES / script).read_text(encoding="utf-8") if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"'sha256-{digest}'" if code else "'none'"
    return environment.get_template(template).render(values, code=code, scripts=policy)


def times(value: float) -> str:
    """A ratio."""
    return figures.times(value, "\N{MULTIPLICATION SIGN}")


def short(name: str) -> str:
    """A model's name without the folder, or the owner, before it."""
    return PurePath(name).name or name


def share(value: float, whole: float) -> str:
    """`value` in percent of `whole`, for lengths of a drawing."""
    return f"{100 * value / whole:.3f}" if whole else "0"
