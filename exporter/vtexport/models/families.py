"""The families that vtexport reads, by config.json's model_type."""

from __future__ import annotations

from pathlib import Path

from vtexport.errors import ModelError
from vtexport.models.bounds import shown
from vtexport.models.family import Family
from vtexport.models.llava import Llava
from vtexport.models.llava_next import LlavaNext
from vtexport.models.llava_onevision import LlavaOnevision
from vtexport.models.spec import ModelSpec, ViewChoice, read_config
from vtexport.models.video_llava import VideoLlava
from vtexport.options import validate

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (Llava(), LlavaNext(), LlavaOnevision(), VideoLlava())
}


def read_spec(folder: Path, choice: ViewChoice | None = None) -> ModelSpec:
    """The geometry of the checkpoint in `folder`, whose family config.json names.

    Args:
        folder: the checkpoint.
        choice: the user's choices about its views.

    Raises:
        ModelError: the folder holds no LLaVA checkpoint, or one with a feature that vtexport does not support.
        InputError: a choice that its family does not have.
    """
    config = read_config(folder)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        named = f"a {shown(model_type)} model" if model_type else "a config.json without model_type"
        raise ModelError(
            f"{folder} holds {named}, not LLaVA; vtexport reads checkpoints of model_type {', '.join(FAMILIES)}"
        )
    choice = choice or ViewChoice()
    validate(choice, f"{model_type} models")
    return FAMILIES[model_type].spec(folder, config, choice)
