"""A CLIP checkpoint's text tower and the projections into the space it shares with its vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import InputError, ModelError, first_line
from vtexport.models.bounds import check_clip, shown
from vtexport.models.llava import Llava
from vtexport.models.spec import ClipSpec, VisionSpec, read_config
from vtexport.models.trust import open_tokenizer, token_ids

#: where a bundle keeps the tokenizer and config.json of its CLIP, below its processor
FOLDER = "clip"


def read_clip(folder: Path, vision: VisionSpec) -> ClipSpec:
    """The geometry of the CLIP checkpoint in `folder`.

    Args:
        folder: a checkpoint of model_type clip: text tower, vision tower, both projections.
        vision: LLaVA's own tower, whose features CLIP's visual projection must fit.

    Raises:
        ModelError: no CLIP checkpoint, or one without a text tower, or one whose vision tower is not LLaVA's.
    """
    from transformers import CLIPConfig

    config = read_config(folder)
    if config.get("model_type") != "clip" or "text_config" not in config:
        raise ModelError(
            f"{folder} holds a {shown(config.get('model_type'))} model, not CLIP with its text tower; give the checkpoint "
            "that LLaVA's tower is from, such as openai/clip-vit-large-patch14-336"
        )
    try:
        parsed = CLIPConfig.from_dict(config)
        text, width = parsed.text_config, parsed.vision_config.hidden_size
    except Exception as error:  # transformers raises whatever its validators raise
        raise ModelError(
            f"{folder / 'config.json'} is not a valid CLIP config ({first_line(error)}); get it again"
        ) from error
    if width != vision.hidden_size:
        raise ModelError(
            f"{folder} has a vision tower of width {width}, LLaVA's is {vision.hidden_size}; give the CLIP that "
            "LLaVA's tower is from"
        )
    spec = ClipSpec(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        activation=text.hidden_act,
        layer_norm_eps=text.layer_norm_eps,
        length=text.max_position_embeddings,
        projection=parsed.projection_dim,
        # Old configs say 2, which their tokenizers never used; transformers then takes the greatest id, and so do we.
        eos_token_id=None if text.eos_token_id == 2 else text.eos_token_id,
    )
    check_clip(folder / "config.json", spec)
    return spec


class ClipTokenizer:
    """Turns questions into the token ids of CLIP's text tower, which takes `length` of them out of `vocabulary`."""

    def __init__(self, folder: Path, length: int, vocabulary: int | None = None) -> None:
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise ModelError(f"{folder} has no tokenizer.json; get the tokenizer files of this CLIP checkpoint")
        self.tokenizer: Any = open_tokenizer(folder)
        self._length, self._vocabulary = length, vocabulary

    def ids(self, question: str) -> Array:
        """`question` without its image mark, int64 [length], zeros behind its end token.

        Raises:
            InputError: it has more tokens than the text tower has positions.
            ModelError: the tokenizer fails, or gives tokens that the text tower does not have.
        """
        tokens = token_ids(self.tokenizer, question.replace(Llava.mark, " ").strip())
        if len(tokens) > self._length:
            raise InputError(
                f"the prompt has {len(tokens)} CLIP tokens, but CLIP's text tower takes {self._length}; shorten it, "
                "or build with a method that does not read the question"
            )
        if self._vocabulary is not None and not all(0 <= token < self._vocabulary for token in tokens):
            raise ModelError(
                f"CLIP's tokenizer gives token {max(tokens)}, and its text tower has {self._vocabulary}; the two do not "
                "belong together, get the tokenizer's files again"
            )
        ids = np.zeros(self._length, dtype=np.int64)
        ids[: len(tokens)] = tokens
        return ids
