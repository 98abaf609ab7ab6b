"""PruningPlan: the one static description of a pruning, read by reference, graphs, manifest and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from vtexport.errors import InputError


@dataclass(frozen=True)
class Stage:
    """One pruning step with fixed counts.

    Attributes:
        where: `"vision"`.
        tokens_in: visual tokens that enter the stage.
        kept: tokens that survive as they are.
        recycled: tokens made by merging others.
    """

    where: str
    tokens_in: int
    kept: int
    recycled: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.kept <= self.tokens_in or self.recycled < 0 or self.carried < 1:
            raise ValueError(f"impossible stage {self.kept} + {self.recycled} of {self.tokens_in} tokens")

    @property
    def carried(self) -> int:
        """Tokens that leave the stage: kept + recycled."""
        return self.kept + self.recycled


@dataclass(frozen=True)
class PruningPlan:
    """Where and how far visual tokens are pruned; every count an int fixed before tracing.

    Attributes:
        method: name of the method.
        keep: the keep ratio that was asked for.
        num_visual_tokens: visual tokens an image before pruning.
        num_layers: decoder layers.
        leading: visual tokens before the patches (CLS under strategy `full`), always kept.
        stages: in the order in which they act; none for `dense`.
        options: the method's own options, resolved.
    """

    method: str
    keep: float
    num_visual_tokens: int
    num_layers: int
    leading: int = 0
    stages: tuple[Stage, ...] = ()
    options: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        tokens = self.num_visual_tokens
        for stage in self.stages:
            if stage.tokens_in != tokens:
                raise ValueError(f"a stage takes {stage.tokens_in} tokens but {tokens} reach it")
            tokens = stage.carried

    @property
    def vision_tokens(self) -> int:
        """K, the visual tokens that leave the vision engine for the decoder."""
        return self.stages[0].carried if self.stages else self.num_visual_tokens

    @property
    def patch_budget(self) -> int:
        """Tokens that a vision-stage method chooses or makes, the leading ones not counted."""
        return self.vision_tokens - self.leading

    @property
    def per_layer(self) -> tuple[int, ...]:
        """Visual tokens that enter each decoder layer."""
        return (self.vision_tokens,) * self.num_layers

    @property
    def mean_visual_tokens(self) -> float:
        """Mean over the decoder's layers of the visual tokens that enter one."""
        return sum(self.per_layer) / self.num_layers


def token_budget(tokens: int, keep: float, leading: int = 0) -> int:
    """round(keep * tokens), halves up; always at least one patch beside the leading tokens.

    Raises:
        InputError: `keep` is not in (0, 1], or leaves no patch at all.
    """
    if not (math.isfinite(keep) and 0 < keep <= 1):
        raise InputError(f"--keep {keep:g} is out of range; give a ratio above 0 and at most 1")
    budget = math.floor(keep * tokens + 0.5)
    if budget < leading + 1:
        least = (leading + 0.5) / tokens
        raise InputError(
            f"--keep {keep:g} leaves no image token of {tokens}; the least for this model is about {least:.2g}"
        )
    return budget
