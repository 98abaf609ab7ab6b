"""docs/licences.md lists every direct dependency and every image, and the wheel carries the notices."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest

from vtexport.micro.scenes import _PHOTOS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LICENCES = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", (ROOT / "docs" / "licences.md").read_text("utf-8"), re.M))
EXTRAS = ("openvino", "tensorrt-rtx", "micro", "serve", "plots")
PACKAGES = [
    re.split(r"[<>=\[]", line)[0]
    for line in [*PROJECT["dependencies"], *(line for e in EXTRAS for line in PROJECT["optional-dependencies"][e])]
]
#: words of other fields for what the page names as SPDX does
WORDS = {"Apache-2.0": "apache", "BSD-3-Clause": "bsd"}


@pytest.mark.parametrize("name", PACKAGES)
def test_every_direct_dependency_is_listed_with_its_licence(name: str) -> None:
    try:
        stated = metadata(name)
    except PackageNotFoundError:
        pytest.skip(f"needs {name}")
    fields = [stated.get("License-Expression"), stated.get("License"), *(stated.get_all("Classifier") or [])]
    licence = LICENCES[name]
    assert WORDS.get(licence, licence).lower() in " ".join(field for field in fields if field).lower()


def test_every_photograph_is_listed() -> None:
    assert {name for names in _PHOTOS.values() for name in names} <= set(LICENCES)


def test_the_wheel_carries_the_notices() -> None:
    assert {"LICENSE", "THIRD-PARTY-NOTICES.txt"} == set(PROJECT["license-files"])
    notices = (ROOT / "THIRD-PARTY-NOTICES.txt").read_text(encoding="utf-8")
    assert "Wenzel Jakob" in notices
    assert "Thibaut Goetghebuer-Planchon" in notices
