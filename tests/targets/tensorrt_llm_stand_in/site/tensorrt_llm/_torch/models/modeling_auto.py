"""Models by the architecture that a configuration names."""

from __future__ import annotations

from ..model_config import ModelConfig
from ..utils import model_extra_attrs
from .modeling_utils import MODEL_CLASS_MAPPING, DecoderModelForCausalLM


class AutoModelForCausalLM:
    """Makes models."""

    @staticmethod
    def from_config(config: ModelConfig) -> DecoderModelForCausalLM:
        """The model of `config.pretrained_config.architectures[0]`.

        Raises:
            ValueError: there is none of that name.
        """
        name = config.pretrained_config.architectures[0]
        made = MODEL_CLASS_MAPPING.get(name)
        if made is None:
            raise ValueError(f"unknown architecture {name}")
        if issubclass(made, DecoderModelForCausalLM):
            config._frozen = False
            config.skip_create_weights_in_init = True
            config._frozen = True
        with model_extra_attrs(config.extra_attrs):
            model = made(config)
        model.extra_attrs = config.extra_attrs
        return model
