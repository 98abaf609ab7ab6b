"""PruningPlan: the static description of a pruning that the reference, graphs, manifest and reports all read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vtexport.errors import InputError
from vtexport.options import Option

if TYPE_CHECKING:
    from vtexport.pruning.method import MethodChoice

VISION = "vision"
_DECODER = "decoder."
#: far above any model: bounds of what a file may say that a plan is
MOST_TOKENS, MOST_LAYERS = 1 << 20, 1024


@dataclass(frozen=True)
class Stage:
    """One pruning step with fixed counts.

    Attributes:
        where: `"vision"`, or `"decoder.L"`: on the output of decoder layer L, which itself runs unpruned.
        tokens_in: visual tokens that enter the stage.
        kept: tokens that survive as they are.
        recycled: tokens made by merging others.
    """

    where: str
    tokens_in: int
    kept: int
    recycled: int = 0

    def __post_init__(self) -> None:
        # Only a decoder can go on without visual tokens: their content has reached the text tokens by then.
        least = 1 if self.layer is None else 0
        if min(self.kept, self.recycled) < 0 or not least <= self.carried <= self.tokens_in:
            raise ValueError(f"impossible stage {self.kept} + {self.recycled} of {self.tokens_in} tokens")

    @classmethod
    def decoder(cls, layer: int, tokens_in: int, kept: int, recycled: int = 0) -> Stage:
        """A stage on the output of decoder layer `layer`."""
        return cls(f"{_DECODER}{layer}", tokens_in, kept, recycled)

    @property
    def layer(self) -> int | None:
        """The decoder layer whose output is pruned; None for the vision stage."""
        if self.where == VISION:
            return None
        number = self.where.removeprefix(_DECODER)
        if number == self.where or not (number.isascii() and number.isdecimal()):
            raise ValueError(f"a stage stands at {VISION!r} or {_DECODER}L, not at {self.where!r}")
        return int(number)

    @property
    def carried(self) -> int:
        """Tokens that leave the stage: kept + recycled."""
        return self.kept + self.recycled


@dataclass(frozen=True)
class PruningPlan:
    """Where visual tokens are pruned and how many stay; every count is an int that is fixed before tracing.

    Attributes:
        methods: the methods, with their options resolved.
        keep: the keep ratio that was asked for.
        num_visual_tokens: greatest number of visual tokens per prompt before pruning.
        num_layers: decoder layers.
        leading: visual tokens before a view's patches (CLS under strategy `full`), always kept by a vision stage.
        stages: in the order in which they act; none for `dense`.
        views: views per prompt, each pruned by itself in the vision stage.
        newlines: greatest number of newline tokens per prompt (`vtexport.models.spec.ViewSpec`). If there are any, the
            number of visual tokens depends on the sizes of a prompt's images, and all counts here are upper bounds.
    """

    methods: MethodChoice
    keep: float
    num_visual_tokens: int
    num_layers: int
    leading: int = 0
    stages: tuple[Stage, ...] = ()
    views: int = 1
    newlines: int = 0

    def __post_init__(self) -> None:
        tokens, before = self.num_visual_tokens, -1
        if not (0 < tokens <= MOST_TOKENS and 0 < self.num_layers <= MOST_LAYERS):
            raise ValueError(f"impossible plan of {tokens} tokens and {self.num_layers} layers")
        for number, stage in enumerate(self.stages):
            if stage.tokens_in != tokens:
                raise ValueError(f"a stage takes {stage.tokens_in} tokens but {tokens} reach it")
            if stage.layer is None and number > 0:
                raise ValueError("the vision stage comes first, and once")
            if stage.layer is not None and not before < stage.layer < self.num_layers:
                raise ValueError(f"stage {stage.where} is out of order or outside {self.num_layers} layers")
            tokens, before = stage.carried, -1 if stage.layer is None else stage.layer

    @property
    def method(self) -> str:
        """The name of the method, or of a vision-stage and a decoder-stage method as `a+b`."""
        return self.methods.name

    @property
    def options(self) -> dict[str, Option]:
        """The options of the methods by name."""
        return self.methods.options

    @property
    def vision_stage(self) -> Stage | None:
        """The stage before the decoder, if there is one."""
        return self.stages[0] if self.stages and self.stages[0].layer is None else None

    @property
    def decoder_stages(self) -> dict[int, Stage]:
        """The stages inside the decoder, by the layer on whose output they act."""
        return {stage.layer: stage for stage in self.stages if stage.layer is not None}

    @property
    def vision_tokens(self) -> int:
        """K, the visual tokens that leave the vision engine for the decoder."""
        return self.num_visual_tokens if self.vision_stage is None else self.vision_stage.carried

    @property
    def patch_budget(self) -> int:
        """Tokens that a vision-stage method chooses or makes per view, without the leading ones."""
        return (self.vision_tokens - self.newlines) // self.views - self.leading

    @property
    def merged_budget(self) -> int:
        """How many of `patch_budget` a vision-stage method makes by merging."""
        return 0 if self.vision_stage is None else self.vision_stage.recycled // self.views

    def entering(self, filled: Sequence[int]) -> list[list[int]]:
        """Visual tokens that enter each decoder layer, by layer and row; each row has `filled` of `vision_tokens`."""
        tokens, layers = list(filled), []
        for layer in range(self.num_layers):
            layers.append(tokens)
            stage = self.decoder_stages.get(layer)
            if stage is not None:
                # A row that loses nothing has nothing merged either.
                tokens = [stage.carried if count > stage.kept else count for count in tokens]
        return layers

    @property
    def positions(self) -> str:
        """`"compact"`: contiguous after each pruning; `"original"`: every token keeps its own."""
        return "compact" if self.methods.decoder is None else self.methods.decoder.positions

    @property
    def per_layer(self) -> tuple[int, ...]:
        """Visual tokens that enter each decoder layer, as many as its KV cache holds."""
        return self._counts(counted_pruned=False)

    @property
    def mean_visual_tokens(self) -> float:
        """Mean over the decoder's layers of the visual tokens that enter a layer."""
        return sum(self.per_layer) / self.num_layers

    @property
    def mean_visual_tokens_sparsevlm(self) -> float:
        """The same mean by SparseVLM's count, in which a pruning layer counts as pruned already."""
        return sum(self._counts(counted_pruned=True)) / self.num_layers

    def _counts(self, *, counted_pruned: bool) -> tuple[int, ...]:
        stages, tokens, counts = self.decoder_stages, self.vision_tokens, []
        for layer in range(self.num_layers):
            after = stages[layer].carried if layer in stages else tokens
            counts.append(after if counted_pruned else tokens)
            tokens = after
        return tuple(counts)


def check_keep(keep: float) -> None:
    """Refuse a keep ratio outside (0, 1].

    Raises:
        InputError: `keep` is outside.
    """
    if not (math.isfinite(keep) and 0 < keep <= 1):
        raise InputError(f"--keep {keep:g} is out of range; give a ratio above 0 and at most 1")


def round_half_up(value: float) -> int:
    """Round halves up; Python's `round` rounds them to even."""
    return math.floor(value + 0.5)


def token_budget(tokens: int, keep: float, leading: int = 0) -> int:
    """round(keep * tokens), halves rounded up; at least one patch besides the leading tokens.

    Raises:
        InputError: `keep` is not in (0, 1], or leaves no patch at all.
    """
    check_keep(keep)
    budget = round_half_up(keep * tokens)
    if budget < leading + 1:
        least = (leading + 0.5) / tokens
        raise InputError(
            f"--keep {keep:g} leaves no image token of {tokens}; the least for this model is about {least:.2g}"
        )
    return budget
