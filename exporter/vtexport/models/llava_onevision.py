"""The family `llava_onevision`: SigLIP and Qwen2, any resolution for one image, base views for several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtexport.errors import InputError
from vtexport.models.anyres import Anyres
from vtexport.models.spec import ViewChoice, VisionSpec
from vtexport.models.views import Size

# Beyond this ratio of sides to those of the tiles it is made for, the model shrinks stitched features.
_INTERPOLATES = 1.1


class LlavaOnevision(Anyres):
    """One image is tiled; of several each is one view, with a newline behind it."""

    model_type = "llava_onevision"

    def tiles(self, parsed: Any, vision: VisionSpec, choice: ViewChoice, images: int) -> Size | None:
        if images > 1:
            if choice.grid is not None:
                raise InputError("--grid has no effect with --images: this model tiles one image only; leave it out")
            return None
        found = super().tiles(parsed, vision, choice, images)
        assert found is not None, "one image is tiled"
        most = int(int(str(parsed.vision_aspect_ratio).rpartition("_")[2]) * _INTERPOLATES**2)
        if found[0] * found[1] > most:
            raise InputError(
                f"--grid {choice.grid} has more than the {most} tiles whose features this model keeps as they are; beyond, it "
                "interpolates them to a size of each image's own, which a compiled graph cannot; give a smaller grid"
            )
        return found

    def process(self, processor: Any, pictures: Sequence[Any]) -> Any:
        # Nested, or the processor takes every image for a prompt of its own.
        return processor(images=[list(pictures)], return_tensors="np")
