"""The base class of model families: how config.json is read, and how images become views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vtexport.errors import InputError, ModelError, first_line
from vtexport.models.bounds import check_ends, check_spec, shown
from vtexport.models.spec import DecoderSpec, ModelSpec, ViewChoice, ViewSpec, VisionSpec
from vtexport.models.views import Size, Views
from vtexport.reading import Unreadable, read_json

#: RoPE types whose table is the same for every sequence length
SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
#: the numbers that each of them needs
ROPE_NEEDS = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("rope_theta", "factor"),
}
AGAIN = "; download the checkpoint again"
_TOWERS = {"clip_vision_model": "clip", "clip": "clip", "siglip_vision_model": "siglip"}
_DECODERS = ("llama", "mistral", "qwen2")


class Family:
    """To add a family, write a subclass in a file of its own and list it in `vtexport.models.families.FAMILIES`."""

    #: config.json's model_type
    model_type: ClassVar[str]
    #: the text that stands for an image in a prompt, and the type that a chat template gives to such a part
    mark: ClassVar[str] = "<image>"
    part: ClassVar[str] = "image"
    #: the name of the vision tower's module
    tower: ClassVar[str] = "vision_tower"
    #: views per image, or frames per video
    frames: ClassVar[int] = 1

    def spec(self, folder: Path, config: dict[str, Any], choice: ViewChoice) -> ModelSpec:
        """The geometry, read through transformers' own configuration classes, which know every default.

        Raises:
            ModelError: the checkpoint has a feature that the graphs do not support.
            InputError: `choice` asks for something that the family does not have.
        """
        path = folder / "config.json"
        parsed = parse_config(path, config)
        try:
            vision, decoder = _vision(path, parsed), _decoder(path, parsed)
            spec = ModelSpec(
                family=self.model_type,
                vision=vision,
                decoder=decoder,
                projector_bias=bool(parsed.multimodal_projector_bias),
                projector_activation=parsed.projector_hidden_act,
                image_token_id=self.token_id(parsed),
                eos_token_ids=_eos_ids(folder, parsed.text_config.eos_token_id, decoder.vocab_size),
                config=config,
                choice=choice,
            )
        except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
            # Its values may be of any type, and transformers checks few of them.
            raise ModelError(f"{path} is not a valid {self.model_type} config ({first_line(error)})" + AGAIN) from error
        check_spec(path, spec)
        return replace(spec, views=self.views(path, parsed, vision, choice))

    def token_id(self, parsed: Any) -> int:
        """The token id of `mark`."""
        return int(parsed.image_token_id)

    def views(self, path: Path, parsed: Any, vision: VisionSpec, choice: ViewChoice) -> ViewSpec:
        """How a prompt's images become views; see `ViewChoice`."""
        self.refuse(choice, "grid", "arrangement")
        return ViewSpec(images=choice.images or 1, views=self.frames)

    def refuse(self, choice: ViewChoice, *names: str) -> None:
        """Raise InputError for choices that this family does not have."""
        for name in names:
            if getattr(choice, name) is not None:
                raise InputError(f"--{name} has no effect with a {self.model_type} model; leave it out")

    def resolutions(self, spec: ModelSpec) -> Sequence[Size]:
        """The resolutions, in rows and columns of pixels, that an image may be scaled to before it is cut into tiles."""
        return []

    def look(self, processor: Any, spec: ModelSpec, pictures: Sequence[Any]) -> Views:
        """The views of `pictures`, one picture per image of the prompt.

        Raises:
            InputError: a picture that the bundle's views cannot hold.
        """
        return Views(pixels_of(processed(processor, list(pictures))))


def parse_config(path: Path, config: dict[str, Any]) -> Any:
    """`config`, the content of `path`, as transformers' configuration class of its family, which knows every default.

    Raises:
        ModelError: it is not valid, or it sets what is not a setting.
    """
    from transformers import AutoConfig, PreTrainedConfig

    for section in (config, config.get("text_config"), config.get("vision_config")):
        # A setting of that name would take the place of a method.
        strange = next((key for key in section or () if callable(getattr(PreTrainedConfig, key, None))), None)
        if strange is not None:
            raise ModelError(f"{path}: {strange!r} is not a setting" + AGAIN)
    try:
        return AutoConfig.for_model(**config)
    except Exception as error:  # transformers raises whatever its validators raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{path} is not a valid {config.get('model_type')} config ({reason})" + AGAIN) from error


def processed(processor: Any, images: Any) -> Any:
    """What an image processor makes of `images`.

    Raises:
        ModelError: it fails, by settings that do not go together.
    """
    try:
        return processor(images=images, return_tensors="np")
    except Exception as error:  # whatever its settings lead to
        raise ModelError(
            f"the model's image processor fails ({first_line(error)}); get preprocessor_config.json of the checkpoint"
        ) from error


def pixels_of(output: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """The pixels in an image processor's output, float32 [..., 3, S, S]."""
    # Video-LLaVA's processor named them otherwise before transformers 5.20.
    pixels = output.get("pixel_values_images", output.get("pixel_values"))
    return np.asarray(pixels, dtype=np.float32)


def _vision(path: Path, parsed: Any) -> VisionSpec:
    vision = parsed.vision_config
    if not isinstance(vision.model_type, str) or vision.model_type not in _TOWERS:
        raise ModelError(f"{path}: the vision tower is {vision.model_type!r}; only CLIP and SigLIP are supported")
    kind = _TOWERS[vision.model_type]
    layer = parsed.vision_feature_layer
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ModelError(f"{path}: vision_feature_layer is {shown(layer)}; only a single layer is supported")
    feature_layer = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
    if not 0 < feature_layer <= vision.num_hidden_layers:
        raise ModelError(f"{path}: vision_feature_layer {shown(layer)} is outside the tower; check the config")
    strategy = parsed.vision_feature_select_strategy
    if strategy not in ("default", "full"):
        raise ModelError(f"{path}: vision_feature_select_strategy is {shown(strategy)}; use 'default' or 'full'")
    if kind == "siglip" and strategy != "full":
        raise ModelError(f"{path}: vision_feature_select_strategy {strategy!r} drops a patch of SigLIP; use 'full'")
    if kind == "clip" and vision.image_size % vision.patch_size:
        raise ModelError(f"{path}: image_size {vision.image_size} is not a multiple of patch_size; check the config")
    return VisionSpec(
        kind=kind,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        channels=vision.num_channels,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_layers=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        activation=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
        feature_layer=feature_layer,
        strategy=strategy,
    )


def _decoder(path: Path, parsed: Any) -> DecoderSpec:
    text = parsed.text_config
    if text.model_type not in _DECODERS:
        raise ModelError(
            f"{path}: the language model is {text.model_type!r}; only {', '.join(_DECODERS)} are supported"
        )
    rope = text.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE:
        raise ModelError(
            f"{path}: RoPE of type {shown(rope_type)} changes with the sequence length, which a compiled table "
            f"cannot; supported are {', '.join(SUPPORTED_ROPE)}"
        )
    missing = next((name for name in ROPE_NEEDS[rope_type] if not isinstance(rope.get(name), int | float)), None)
    if missing is not None:
        raise ModelError(f"{path}: RoPE of type {rope_type} needs the number {missing}; check rope_parameters")
    biased = bool(getattr(text, "attention_bias", False))
    # Within its window a sliding-window decoder equals a plain one, so positions end with the window.
    window = getattr(text, "sliding_window", None)
    return DecoderSpec(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        activation=text.hidden_act,
        rms_norm_eps=text.rms_norm_eps,
        max_positions=min(text.max_position_embeddings, window or text.max_position_embeddings),
        # transformers ties LLaVA's head if either flag is set.
        tied_embeddings=bool(parsed.tie_word_embeddings or text.tie_word_embeddings),
        query_bias=biased or text.model_type == "qwen2",
        output_bias=biased,
        mlp_bias=bool(getattr(text, "mlp_bias", False)),
    )


def _eos_ids(folder: Path, from_config: Any, vocabulary: int) -> tuple[int, ...]:
    """The end tokens in generation_config.json, which generate() obeys, or else the language model's."""
    path, ids = folder / "generation_config.json", from_config
    if path.exists():
        try:
            ids = read_json(path, kind=dict[str, Any]).get("eos_token_id", ids)
        except Unreadable as error:
            raise ModelError(f"{path} is not a readable JSON object ({error}); download it again") from error
    if ids is None:
        return ()
    listed = tuple(ids) if isinstance(ids, list) else (ids,)
    check_ends(path if path.exists() else folder / "config.json", listed, vocabulary)
    return listed
