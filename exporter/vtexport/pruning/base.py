"""What a vision-stage method is, and the part all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vtexport.pruning.plan import PruningPlan, Stage, token_budget

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TowerState:
    """What the vision tower offers a method, taken from the layer that yields the selected features.

    Attributes:
        features: that layer's output, CLS first [B, 1 + V, C].
        query: its attention queries of the CLS row [B, H, 1, D].
        key: its attention keys [B, H, 1 + V, D].
        scale: the factor on query · key before softmax.
        grid: patches a side; V = grid².
    """

    features: Tensor
    query: Tensor
    key: Tensor
    scale: float
    grid: int


@dataclass(frozen=True)
class Pruned:
    """A method's result: tokens [B, K, C]; index [B, K] int32 of kept ones (None if all are merged); score [B, V]."""

    tokens: Tensor
    index: Tensor | None
    score: Tensor | None = None


class VisionMethod:
    """A method that acts between vision tower and projector.

    To add one: a subclass in a file of its own, listed in `vtexport.pruning.METHODS`, with its tests.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    #: names and defaults of the options that the method takes
    options: ClassVar[Mapping[str, int]] = {}
    #: whether the method rates patches, so that a debug build has scores to give out
    scores: ClassVar[bool] = False

    def plan(self, tokens: int, layers: int, keep: float, leading: int, options: Mapping[str, int]) -> PruningPlan:
        """The static counts for `tokens` visual tokens; see `vtexport.pruning.make_plan`."""
        kept = token_budget(tokens, keep, leading)
        stage = Stage("vision", tokens, kept)
        return PruningPlan(self.name, keep, tokens, layers, leading, (stage,), options)

    def constants(self, plan: PruningPlan, grid: int) -> dict[str, np.ndarray[Any, Any]]:
        """Arrays fixed at build time that `select` reads; stored beside the weights, never traced."""
        return {}

    def select(self, state: TowerState, plan: PruningPlan, constants: Mapping[str, Tensor]) -> Pruned:
        """Choose or make `plan.patch_budget` of the V patch tokens; `index` counts patches from 0."""
        raise NotImplementedError


def prune(method: VisionMethod, plan: PruningPlan, state: TowerState, constants: Mapping[str, Tensor]) -> Pruned:
    """Apply `plan` to a tower's state; `constants` are `method.constants` as tensors.

    Returns:
        tokens [B, K, C] and, into the unpruned sequence of visual tokens, index [B, K] int32 ascending.
        Leading tokens (CLS under strategy `full`) stay in front and are never rated.
    """
    import torch

    patches = state.features[:, 1:]
    if not plan.stages:
        return Pruned(state.features if plan.leading else patches, None)
    pruned = method.select(state, plan, constants)
    if not plan.leading:
        return pruned
    tokens = torch.cat([state.features[:, :1], pruned.tokens], dim=1)
    index = pruned.index
    if index is not None:
        index = torch.cat([torch.zeros_like(index[:, :1]), index + 1], dim=1)
    return Pruned(tokens, index, pruned.score)
