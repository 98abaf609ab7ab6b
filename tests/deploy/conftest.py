"""A bundle that several tests of deploying share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoints import MICRO
from tests.conftest import BuildBundle
from vtexport.pruning.adaptive import AdaptiveTable
from vtexport.pruning.calibration import Calibration


@pytest.fixture(scope="session")
def adaptive_bundle(build_bundle: BuildBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """micro-llava with `--keep auto`, by a table of which images of spread up to 9.5 patches get a quarter."""
    own, path = Calibration.load(MICRO / "calibration.toml"), tmp_path_factory.mktemp("ranks") / "ranks.toml"
    table = AdaptiveTable("sparsevlm", (0.5, 0.25), (9.5, 20.0), ((1.0, 1.0), (1.0, 0.0)))
    replace(own, adaptive=(table,)).save(path)
    return build_bundle(MICRO, "auto", "sparsevlm", buckets=(0.5, 0.25), calibration=path)
