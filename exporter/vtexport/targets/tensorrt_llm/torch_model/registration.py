"""Registers a bundle's classes with TensorRT-LLM."""

from __future__ import annotations

from tensorrt_llm._torch.attention_backend import TrtllmAttention
from tensorrt_llm._torch.models.modeling_utils import register_auto_model
from tensorrt_llm.inputs import (
    MultimodalPlaceholderMetadata,
    MultimodalPlaceholderPlacement,
    register_input_processor,
)

from vtexport.models.families import FAMILIES
from vtexport.targets.tensorrt_llm.torch_model.description import Description
from vtexport.targets.tensorrt_llm.torch_model.metadata import metadata_class
from vtexport.targets.tensorrt_llm.torch_model.modeling_vtexport_llava import VtexportLlava
from vtexport.targets.tensorrt_llm.torch_model.processor import VtexportInputProcessor
from vtexport.targets.tensorrt_llm.torch_model.stages import Schedule


def register_model(description: Description, module: str) -> type[VtexportLlava]:
    """Register the model and the input processor of a bundle, and if it prunes inside the decoder, its metadata.

    Args:
        description: the bundle's.
        module: the module that will hold the class returned here as `VtexportLlava`. TensorRT-LLM pickles the class by
            that name for its worker processes, which so import the module, and with that register there as well.
    """
    schedule, spec = Schedule(description.plan), description.spec
    told = {"description": description, "__module__": module}
    model = type(VtexportLlava.__name__, (VtexportLlava,), {**told, "schedule": schedule})
    processor = type(VtexportInputProcessor.__name__, (VtexportInputProcessor,), told)
    family = FAMILIES[spec.family]
    for architecture in spec.config["architectures"]:
        register_auto_model(architecture)(model)
    register_input_processor(
        processor,
        model_type=spec.family,
        placeholder_metadata=MultimodalPlaceholderMetadata(
            placeholder_map={family.part: family.mark},
            placeholder_placement=MultimodalPlaceholderPlacement.BEFORE_TEXT,
        ),
    )(model)
    if schedule.stages:
        # The engine makes the metadata of every step of this class, and of its copies for CUDA graphs.
        TrtllmAttention.Metadata = metadata_class(schedule)
    return model
