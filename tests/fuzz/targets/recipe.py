"""Recipes, and the checkpoint, calibration and dtype that they name."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from vtexport.models import resolve

_KNOWN = resolve.engines_folder()


def seeds(_place: Path) -> list[bytes]:
    """Recipes that ship: of a folder beside them, and of a hub id."""
    return [(_KNOWN / f"{name}.toml").read_bytes() for name in ("micro-llava", "llava-1.5-7b")]


def one(data: bytes, place: Path) -> None:
    """Resolve a model by it; nothing is downloaded."""
    path = place / "broken.toml"
    path.write_bytes(data)
    try:
        with (
            mock.patch.object(resolve, "engines_folder", mock.Mock(return_value=place)),
            mock.patch.object(resolve, "_download", lambda hub_id, config_only: place / hub_id),
        ):
            resolve.resolve_model("broken")
            resolve.recipe_calibration("broken")
            resolve.recipe_dtype("broken")
    finally:
        path.unlink()
