"""A model's geometry, read from config.json; no size is hard-coded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from vtexport.errors import ModelError
from vtexport.models.bounds import IMAGES, check_config
from vtexport.models.trust import check_settings
from vtexport.options import Meta
from vtexport.reading import Unreadable, read_json

#: bytes per weight, by an engine's dtype
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class VisionSpec:
    """A vision tower, `clip` or `siglip` by `kind`, and which of its states LLaVA reads.

    CLIP has a CLS token before its patches and a norm before its layers. SigLIP has neither, but its patch embedding
    has a bias.
    `feature_layer` counts states as transformers' `hidden_states` does, never negative: 0 is the embedding,
    i the output of layer i - 1. Layers after it never run.
    """

    kind: str
    image_size: int
    patch_size: int
    channels: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: str
    layer_norm_eps: float
    feature_layer: int
    strategy: str

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def class_token(self) -> bool:
        """Whether a CLS token stands before the patches."""
        return self.kind == "clip"

    @property
    def num_patches(self) -> int:
        """Patches per view, without the CLS token."""
        return self.grid * self.grid

    @property
    def leading(self) -> int:
        """Visual tokens before a view's patches: CLS under strategy `full`."""
        return int(self.class_token and self.strategy == "full")

    @property
    def view_tokens(self) -> int:
        """Visual tokens per view before pruning."""
        return self.num_patches + self.leading

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class ViewSpec:
    """How a prompt's images become views of the tower, and how their tokens become one visual sequence.

    Attributes:
        images: images (or videos) per prompt.
        views: views per image: 1, a base view and its tiles, or the frames of a video.
        tiles: rows and columns of the tiles that follow the base view, or None.
        newlines: greatest number of newline tokens per image. If there are any, the sequence is laid out by rows: the
            base view, then the tiles stitched together without their padding, with a newline behind every row; its
            length depends on the image. If there are none, views follow each other as they are.
    """

    images: int = 1
    views: int = 1
    tiles: tuple[int, int] | None = None
    newlines: int = 0

    @property
    def total(self) -> int:
        """Views per prompt."""
        return self.images * self.views

    @property
    def counted(self) -> bool:
        """Whether the visual tokens of each image must be counted: prompts have several images, or newlines."""
        return self.images > 1 or self.newlines > 0

    @property
    def has_frames(self) -> bool:
        """Whether a prompt has videos in place of images."""
        return self.views > 1 and self.tiles is None

    @property
    def pictures(self) -> int:
        """Pictures per prompt: its images, or all frames of its videos."""
        return self.total if self.has_frames else self.images


@dataclass(frozen=True)
class ViewChoice:
    """The user's choices that a `ViewSpec` is made from; None for a choice that was not made."""

    images: Annotated[
        int | None, Meta(ge=1, le=IMAGES, description="Images, or videos, per prompt.", extra={"default": "1"})
    ] = None
    grid: Annotated[
        str | None,
        Meta(
            description="Rows x columns of tiles that a bundle for an any-resolution model is built for, such as 2x2.",
            extra={"metavar": "RxC"},
        ),
    ] = None
    arrangement: Annotated[
        Literal["rows", "views"] | None,
        Meta(
            description="Order of an any-resolution image's tokens: rows, with newlines and without padding, as the "
            "model has it, or tile by tile (views), without newlines and with padding.",
            extra={"default": "rows"},
        ),
    ] = None


@dataclass(frozen=True)
class ClipSpec:
    """CLIP's text tower, and the width of the space that it shares with the vision tower.

    `length` is the number of tokens per question, padding included; `eos_token_id` is None if the greatest id ends it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: str
    layer_norm_eps: float
    length: int
    projection: int
    eos_token_id: int | None

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    def num_parameters(self, vision_size: int) -> int:
        """Weights of the text tower and of both projections; visual features have width `vision_size`."""
        width, inner = self.hidden_size, self.intermediate_size
        layer = 4 * width**2 + 2 * width * inner + 9 * width + inner
        projections = (width + vision_size) * (self.projection + 2)
        return (self.vocab_size + self.length) * width + self.num_layers * layer + projections

    def flops(self) -> int:
        """FLOPs of the text tower for one question."""
        weights = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        return self.num_layers * (2 * self.length * weights + 2 * 2 * self.length * self.length * self.hidden_size)


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder of Llama's architecture: Llama, Mistral, Qwen2.

    `query_bias`: the projections to query, key and value have a bias; `output_bias`: attention's output projection has.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    activation: str
    rms_norm_eps: float
    max_positions: int
    tied_embeddings: bool
    query_bias: bool
    output_bias: bool
    mlp_bias: bool


@dataclass(frozen=True)
class ModelSpec:
    """Everything vtexport needs to know about a LLaVA checkpoint besides its weights, and about a CLIP given with it.

    `choice` is the user's choice that `views` was made from.
    """

    family: str
    vision: VisionSpec
    decoder: DecoderSpec
    projector_bias: bool
    projector_activation: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    config: dict[str, Any]
    clip: ClipSpec | None = None
    views: ViewSpec = field(default_factory=ViewSpec)
    choice: ViewChoice = field(default_factory=ViewChoice)

    @property
    def num_visual_tokens(self) -> int:
        """Greatest number of visual tokens per prompt before pruning."""
        return self.views.total * self.vision.view_tokens + self.views.images * self.views.newlines

    def num_parameters(self) -> int:
        """Weights that the engines hold: the tower up to the feature layer, projector, decoder, CLIP's text tower."""
        v, d = self.vision, self.decoder
        tower = v.channels * v.patch_size**2 * v.hidden_size + (v.num_patches + 4) * v.hidden_size
        layer = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size + 9 * v.hidden_size
        tower += v.feature_layer * (layer + v.intermediate_size)
        projector = v.hidden_size * d.hidden_size + d.hidden_size**2
        attention = d.hidden_size * d.head_size * 2 * (d.num_heads + d.num_kv_heads)
        block = attention + 3 * d.hidden_size * d.intermediate_size + 2 * d.hidden_size
        clip = 0 if self.clip is None else self.clip.num_parameters(v.hidden_size)
        embeddings = d.vocab_size * d.hidden_size * (1 if d.tied_embeddings else 2)
        return tower + projector + d.num_layers * block + embeddings + d.hidden_size + clip

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of those weights in an engine's dtype, a key of `ITEMSIZE`."""
        return self.num_parameters() * ITEMSIZE[dtype]


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of `folder`.

    Raises:
        ModelError: there is none, it is not a JSON object, a number in it is out of all bounds, or it asks for code.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        config: dict[str, Any] = read_json(path, kind=dict[str, Any])
    except Unreadable as error:
        raise ModelError(f"{path} is not a readable JSON object ({error}); download the checkpoint again") from error
    check_settings(path, config)
    check_config(path, config)
    return config
