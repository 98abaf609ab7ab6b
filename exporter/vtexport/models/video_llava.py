"""The family `video_llava`: eight frames of a video, each a view of the tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vtexport.errors import InputError
from vtexport.models.family import Family, pixels_of, processed
from vtexport.models.spec import ModelSpec, ViewChoice
from vtexport.models.views import Views


class VideoLlava(Family):
    """CLIP on each frame. CLS is a visual token whatever the strategy says, because that applies to images only."""

    model_type = "video_llava"
    mark = "<video>"
    part = "video"
    tower = "video_tower"
    # What Video-LLaVA was trained on.
    frames = 8

    def spec(self, folder: Path, config: dict[str, Any], choice: ViewChoice) -> ModelSpec:
        spec = super().spec(folder, config, choice)
        return replace(spec, vision=replace(spec.vision, strategy="full"))

    def token_id(self, parsed: Any) -> int:
        return int(parsed.video_token_id)

    def look(self, processor: Any, spec: ModelSpec, pictures: Sequence[Any]) -> Views:
        frames = []
        for video in pictures:
            if not isinstance(video, Sequence) or len(video) != spec.views.views:
                count = len(video) if isinstance(video, Sequence) else 1
                raise InputError(
                    f"a video of {count} frames was given, this model takes {spec.views.views}; give as many"
                )
            frames += [pixels_of(processed(processor, [frame]))[0] for frame in video]
        return Views(np.stack(frames))
