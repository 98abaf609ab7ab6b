"""The families that vtexport reads, by config.json's model_type."""

from __future__ import annotations

from vtexport.models.family import Family
from vtexport.models.llava import Llava
from vtexport.models.llava_next import LlavaNext
from vtexport.models.llava_onevision import LlavaOnevision
from vtexport.models.video_llava import VideoLlava

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (Llava(), LlavaNext(), LlavaOnevision(), VideoLlava())
}
