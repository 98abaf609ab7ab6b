"""The families that vtexport reads, by config.json's model_type."""

from __future__ import annotations

from pathlib import Path

from vtexport.errors import ModelError
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
        choice: what was chosen of its views.

    Raises:
        ModelError: the folder holds no LLaVA checkpoint, or one with a feature vtexport has not.
        InputError: a choice that its family does not have.
    """
    config = read_config(folder)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        named = f"a {kind!r} model" if kind else "a config.json without model_type"
        raise ModelError(
            f"{folder} holds {named}, not LLaVA; vtexport reads checkpoints of model_type {', '.join(FAMILIES)}"
        )
    choice = choice or ViewChoice()
    validate(choice, f"{kind} models")
    return FAMILIES[kind].spec(folder, config, choice)
