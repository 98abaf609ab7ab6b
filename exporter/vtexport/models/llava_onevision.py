"""The family `llava_onevision`: SigLIP and Qwen2, any resolution for one image, base views for several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtexport.errors import InputError, ModelError
from vtexport.models.anyres import Anyres
from vtexport.models.family import processed
from vtexport.models.spec import ViewChoice, VisionSpec
from vtexport.models.views import Size

# The model shrinks stitched features whose side exceeds that of its tile limit by more than this factor.
_INTERPOLATES = 1.1


class LlavaOnevision(Anyres):
    """A single image is tiled; each of several images is one view, with a newline behind it."""

    model_type = "llava_onevision"

    def tiles(self, path: Path, parsed: Any, vision: VisionSpec, choice: ViewChoice, images: int) -> Size | None:
        if images > 1:
            if choice.grid is not None:
                raise InputError("--grid has no effect with --images: this model tiles one image only; leave it out")
            return None
        tiles = super().tiles(path, parsed, vision, choice, images)
        assert tiles is not None, "one image is tiled"
        limit = re.fullmatch(r"anyres_max_([0-9]{1,4})", str(parsed.vision_aspect_ratio))
        if limit is None:
            raise ModelError(f"{path}: vision_aspect_ratio must be anyres_max_ and a number; check the file")
        most = int(int(limit[1]) * _INTERPOLATES**2)
        if tiles[0] * tiles[1] > most:
            raise InputError(
                f"--grid {choice.grid} has more than the {most} tiles whose features this model keeps as they are; "
                "larger ones it resizes for each image, which a compiled graph cannot do; give a smaller grid"
            )
        return tiles

    def process(self, processor: Any, pictures: Sequence[Any]) -> Any:
        # Nested, because the processor would take every image of a flat list for a prompt of its own.
        return processed(processor, [list(pictures)])
