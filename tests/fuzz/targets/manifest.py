"""A bundle's manifest.json: opened, checked and described."""

from __future__ import annotations

import os
from pathlib import Path

from vtexport.bundle.folder import Bundle
from vtexport.bundle.manifest import MANIFEST

BUNDLE = Path(__file__).parents[2] / "data" / "bundle-schema-6"


def seeds(_place: Path) -> list[bytes]:
    """The manifest of a bundle that an earlier vtexport built."""
    return [(BUNDLE / MANIFEST).read_bytes()]


def one(data: bytes, place: Path) -> None:
    """Open the bundle with this manifest, and read all of it."""
    folder = place.parent / "bundle"
    if not folder.exists():
        for path in sorted(BUNDLE.rglob("*")):
            if path.is_file():
                copy = folder / path.relative_to(BUNDLE)
                copy.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, copy) if path.name != MANIFEST else None
    (folder / MANIFEST).write_bytes(data)
    opened = Bundle.open(folder)
    opened.target()
    opened.spec()
    for plan in opened.manifest.pruning_plans():
        assert len(plan.per_layer) == plan.num_layers
        plan.entering([1, plan.vision_tokens])
    opened.manifest.policy()
    opened.size()
