"""The bounds of every number that a model's files give: generous for any real model, and far below what harms."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vtexport.errors import ModelError, cut
from vtexport.models.decoding import MOST_ASPECT
from vtexport.models.pictures import WHOLE_PIXELS

if TYPE_CHECKING:
    from vtexport.models.spec import ClipSpec, ModelSpec
    from vtexport.models.views import Size


class Bound(NamedTuple):
    """The least and the greatest value of a number, and whether it is whole."""

    least: float
    most: float
    whole: bool = True

    def __str__(self) -> str:
        return f"{'a whole number' if self.whole else 'a number'} from {self.least:g} to {self.most:.12g}"

    def holds(self, value: object) -> bool:
        """Whether `value` is such a number; true and false are none."""
        kinds = int if self.whole else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.least <= value <= self.most


_WIDTH, _DEEP, _TOKENS = Bound(1, 1 << 16), Bound(1, 1024), Bound(0, (1 << 21) - 1)
_POSITIONS, _EPSILON, _FACTOR = Bound(1, 1 << 20), Bound(1e-20, 0.1, False), Bound(1e-6, 1e12, False)
#: bounds by the names of config.json, wherever in it; checked before transformers makes anything of these numbers
CONFIG: Mapping[str, Bound] = {
    "hidden_size": _WIDTH,
    "intermediate_size": Bound(1, 1 << 20),
    "projection_dim": _WIDTH,
    "num_hidden_layers": _DEEP,
    "num_attention_heads": _DEEP,
    "num_key_value_heads": _DEEP,
    "head_dim": _DEEP,
    "vocab_size": Bound(1, 1 << 21),
    "max_position_embeddings": _POSITIONS,
    "sliding_window": Bound(1, 1 << 31),
    "max_window_layers": Bound(0, 1 << 16),
    "image_size": Bound(1, 1024),
    "patch_size": Bound(1, 1024),
    "num_channels": Bound(3, 3),
    "layer_norm_eps": _EPSILON,
    "rms_norm_eps": _EPSILON,
    "image_token_index": _TOKENS,
    "image_token_id": _TOKENS,
    "video_token_index": _TOKENS,
    "video_token_id": _TOKENS,
    "rope_theta": Bound(1, 1e15, False),
    "factor": _FACTOR,
    "low_freq_factor": _FACTOR,
    "high_freq_factor": _FACTOR,
    "attention_factor": _FACTOR,
    "beta_fast": _FACTOR,
    "beta_slow": _FACTOR,
    "original_max_position_embeddings": _POSITIONS,
    # Part of a head without RoPE is what the graphs do not have.
    "partial_rotary_factor": Bound(1, 1, False),
}
#: the same by the names of vtexport's own geometry, whose values may also be transformers' defaults
_SPEC: Mapping[str, Bound] = {
    "num_layers": _DEEP,
    "num_heads": _DEEP,
    "num_kv_heads": _DEEP,
    "head_size": _DEEP,
    "channels": CONFIG["num_channels"],
    "feature_layer": _DEEP,
    "max_positions": _POSITIONS,
    "length": _POSITIONS,
    "projection": _WIDTH,
    **{name: CONFIG[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "image_size", "patch_size")},
    **{name: CONFIG[name] for name in ("layer_norm_eps", "rms_norm_eps")},
}
#: settings of config.json that are objects
_SECTIONS = ("text_config", "vision_config", "rope_parameters", "rope_scaling")
#: tiles of one resolution
TOGETHER = 64
#: the most pixels to which the short side of an image may be scaled
_SHORTEST = math.isqrt(WHOLE_PIXELS // MOST_ASPECT)
#: settings of image processors that are sizes in pixels
_SIZES = ("size", "crop_size", "pad_size")
#: activations that the graphs have (`vtexport.graph.tracing.layers`), as transformers calls them
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")
#: resolutions that a model of any resolution may list, and tiles in a row or column of one
PINPOINTS, TILES = 512, 32
#: images per prompt, for the command line as for the checkpoint
IMAGES = 256
#: end tokens
_ENDS = 64


def check_config(path: Path, config: Any) -> None:
    """Check the numbers of config.json as they stand there.

    Raises:
        ModelError: a number is out of its bounds, or of another type; the message names it.
    """
    rest: list[Any] = [config]
    while rest:
        one = rest.pop()
        if isinstance(one, list):
            rest += one
        if not isinstance(one, dict):
            continue
        for key, value in one.items():
            bound = CONFIG.get(key)
            if bound is not None and value is not None and not bound.holds(value):
                raise ModelError(f"{path}: {key} is {shown(value)} and must be {bound}; check the file")
            if key in _SECTIONS and not isinstance(value, dict | None):
                raise ModelError(f"{path}: {key} is {shown(value)} and must be an object; check the file")
        rest += one.values()


def check_spec(path: Path, spec: ModelSpec) -> None:
    """Check a model's geometry, and how its numbers belong together.

    Raises:
        ModelError: a number is out of its bounds, or does not go with another one.
    """
    v, d = spec.vision, spec.decoder
    for part in (v, d):
        _check_numbers(path, part)
    _check_activations(path, v.activation, d.activation, spec.projector_activation)
    _check(path, v.hidden_size % v.num_heads == 0, "the tower's hidden_size is not a multiple of its heads")
    _check(path, d.num_heads % d.num_kv_heads == 0, "num_attention_heads is not a multiple of num_key_value_heads")
    _check(path, d.head_size % 2 == 0, "head_dim is odd, and RoPE turns pairs")
    _check(path, v.grid > 0, "patch_size is greater than image_size")
    _check(path, spec.image_token_id < d.vocab_size, f"the image's token {spec.image_token_id} is not in vocab_size")
    check_ends(path, spec.eos_token_ids, d.vocab_size)


def check_clip(path: Path, spec: ClipSpec) -> None:
    """As `check_spec`, for CLIP's text tower.

    Raises:
        ModelError: as `check_spec`.
    """
    _check_numbers(path, spec)
    _check_activations(path, spec.activation)
    _check(path, spec.hidden_size % spec.num_heads == 0, "hidden_size is not a multiple of num_attention_heads")
    if spec.eos_token_id is not None:
        check_ends(path, (spec.eos_token_id,), spec.vocab_size)


def check_processor(folder: Path, settings: Mapping[str, Any], image_size: int, resolutions: Collection[Size]) -> None:
    """Check the sizes that an image processor scales, crops and pads to, before it sees an image.

    Args:
        folder: where its files are.
        settings: the processor's settings, as its `to_dict` gives them.
        image_size: pixels per side of what the vision tower takes.
        resolutions: those that the model lists, in rows and columns of pixels; none if it does not cut images.

    Raises:
        ModelError: it makes much larger images than the tower takes, or other resolutions than the model lists.
    """
    where = "; check processor_config.json or preprocessor_config.json"
    for name in _SIZES:
        value: Any = settings.get(name)
        # transformers' own class of sizes is no mapping.
        for key, extent in (value if hasattr(value, "items") else {"side": value}).items():
            bound = _side(key, image_size, tiled=bool(resolutions))
            if extent is not None and not bound.holds(extent):
                raise ModelError(
                    f"{folder}: the image processor's {name} has {shown(key)} {shown(extent)}, which must be {bound} where "
                    f"the vision tower takes {image_size}{where}"
                )
    listed: Any = settings.get("image_grid_pinpoints")
    points = listed if isinstance(listed, list | tuple) else [] if listed is None else [listed]
    if len(points) > PINPOINTS or {_resolution(point) for point in points} != set(resolutions):
        raise ModelError(f"{folder}: the image processor has other resolutions than config.json lists{where}")


def _resolution(point: Any) -> tuple[int, ...] | None:
    """`point` if it is a list of whole numbers, which true and false are not."""
    whole = isinstance(point, list | tuple) and all(type(extent) is int for extent in point)
    return tuple(point) if whole else None


def _side(key: object, image_size: int, *, tiled: bool) -> Bound:
    """What an image processor may scale, crop or pad to."""
    if tiled:
        # The size of a tile: smaller ones would be more, and each is scaled to what the tower takes.
        return Bound(image_size, image_size)
    # CLIP's own scales to a little more than it crops to; the long side may be `MOST_ASPECT` times the short one.
    return Bound(1, min(2 * image_size, _SHORTEST) if key == "shortest_edge" else 2 * image_size)


def check_ends(path: Path, ids: tuple[Any, ...], vocabulary: int) -> None:
    """Check the ids of end tokens.

    Raises:
        ModelError: one is no token's.
    """
    _check(path, len(ids) <= _ENDS, f"eos_token_id lists {len(ids)} tokens, more than {_ENDS}")
    strange = [shown(one) for one in ids if not Bound(0, vocabulary - 1).holds(one)]
    _check(path, not strange, f"eos_token_id {strange[0] if strange else 0} is no token of {vocabulary}")


def shown(value: object) -> str:
    """`value`, which may be anything, short enough for a line."""
    if isinstance(value, str | int | float | bool | None):
        return cut(repr(value)) if not isinstance(value, int) or abs(value) < 10**20 else "a huge number"
    return f"of type {type(value).__name__}"


def _check_numbers(path: Path, spec: Any) -> None:
    for one in fields(spec):
        bound, value = _SPEC.get(one.name), getattr(spec, one.name)
        if bound is not None and not bound.holds(value):
            raise ModelError(f"{path}: {one.name} is {shown(value)} and must be {bound}; check the file")
        if isinstance(value, float):
            _check(path, math.isfinite(value), f"{one.name} is {value}")


def _check_activations(path: Path, *names: object) -> None:
    for name in names:
        if name not in ACTIVATIONS:
            raise ModelError(
                f"{path}: the activation {shown(name)} is none that the graphs have; supported are {', '.join(ACTIVATIONS)}"
            )


def _check(path: Path, holds: bool, otherwise: str) -> None:
    if not holds:
        raise ModelError(f"{path}: {otherwise}; check the file")
