"""Calibration files, and the schedules that are solved from them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from vtexport.errors import InputError
from vtexport.models.resolve import engines_folder
from vtexport.pruning.calibration import Calibration
from vtexport.pruning.geometry import Geometry
from vtexport.pruning.planning import adaptive_plans, make_plan

_TOKENS, _LAYERS = 144, 12


def seeds(_place: Path) -> list[bytes]:
    """The calibration that micro-llava's recipe carries."""
    return [(engines_folder() / "micro-llava" / "calibration.toml").read_bytes()]


def one(data: bytes, place: Path) -> None:
    """Load it, and plan with what it says."""
    path = place / "calibration.toml"
    path.write_bytes(data)
    try:
        calibration = Calibration.load(path)
    finally:
        path.unlink()
    calibration.check(path, calibration.model, _TOKENS, _LAYERS)
    geometry = Geometry(_TOKENS, _LAYERS)

    def plan(keep: float):
        return make_plan("fastervlm", geometry, keep=keep)

    # A calibration may be sound and its numbers out of a method's reach.
    with contextlib.suppress(InputError):
        make_plan("pyramiddrop", geometry, keep=0.6, options={"layers": "auto"}, calibration=calibration)
    with contextlib.suppress(InputError):
        make_plan("exit", geometry, options={"layers": "auto"}, calibration=calibration)
    with contextlib.suppress(InputError):
        adaptive_plans("fastervlm", [0.5, 0.25], 0.9, calibration, {}, plan)
