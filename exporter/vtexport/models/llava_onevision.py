"""The family `llava_onevision`: SigLIP and Qwen2, any resolution for one image, base views for several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtexport.errors import InputError
from vtexport.models.anyres import Anyres
from vtexport.models.spec import ViewChoice, VisionSpec
from vtexport.models.views import Size

# The model shrinks stitched features whose side exceeds that of its tile limit by more than this factor.
_INTERPOLATES = 1.1


class LlavaOnevision(Anyres):
    """A single image is tiled; each of several images is one view, with a newline behind it."""

    model_type = "llava_onevision"

    def tiles(self, parsed: Any, vision: VisionSpec, choice: ViewChoice, images: int) -> Size | None:
        if images > 1:
            if choice.grid is not None:
                raise InputError("--grid has no effect with --images: this model tiles one image only; leave it out")
            return None
        tiles = super().tiles(parsed, vision, choice, images)
        assert tiles is not None, "one image is tiled"
        most = int(int(str(parsed.vision_aspect_ratio).rpartition("_")[2]) * _INTERPOLATES**2)
        if tiles[0] * tiles[1] > most:
            raise InputError(
                f"--grid {choice.grid} has more than the {most} tiles whose features this model keeps as they are; "
                "larger ones it resizes for each image, which a compiled graph cannot do; give a smaller grid"
            )
        return tiles

    def process(self, processor: Any, pictures: Sequence[Any]) -> Any:
        # Nested, because the processor would take every image of a flat list for a prompt of its own.
        return processor(images=[list(pictures)], return_tensors="np")
