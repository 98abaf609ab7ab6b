"""What a vision-stage method is, and the part all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vtexport.pruning.method import Method
from vtexport.pruning.plan import VISION, Option, PruningPlan, Stage, token_budget

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TowerLayer:
    """Attention of one tower layer: queries of the CLS row [B, H, 1, D] and all keys [B, H, 1 + V, D]."""

    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class TowerState:
    """What the vision tower offers a method.

    Attributes:
        features: output of the layer that yields the selected features, CLS first [B, 1 + V, C].
        layers: attention of every layer up to that one, which is the last.
        scale: the factor on query · key before softmax.
        grid: patches a side; V = grid².
        project: the projector, token by token: [..., C] -> [..., width of the decoder].
        relevance: for a method that reads the question, the cosine of every patch and the question in CLIP's shared
            space, [B, V] fp32.
    """

    features: Tensor
    layers: Sequence[TowerLayer]
    scale: float
    grid: int
    project: Callable[[Tensor], Tensor]
    relevance: Tensor | None = None

    @property
    def patches(self) -> Tensor:
        """The features without CLS [B, V, C]."""
        return self.features[:, 1:]

    def cls_score(self, layer: int = -1) -> Tensor:
        """Row of CLS in the attention of `layer`, mean over heads, columns of the patches [B, V] fp32.

        Softmax runs over all 1 + V keys, CLS's own included.
        """
        import torch

        from vtexport.pruning.ops import token_score

        query, key = self.layers[layer].query, self.layers[layer].key
        batch, keys = key.shape[0], key.shape[2]
        one = torch.ones(batch, 1, dtype=torch.int64, device=key.device)
        return token_score(query, key, one > 0, one * (keys - 1), one[:, 0], self.grid * self.grid, self.scale)

    def spread(self) -> Tensor:
        """How many patches share CLS's attention in the layer that yields the features, [B] fp32."""
        from vtexport.pruning.ops import spread

        return spread(self.cls_score())


@dataclass(frozen=True)
class Pruned:
    """A method's result.

    Attributes:
        tokens: [B, K, C], projected already if `projected`.
        index: [B, K'] int32, ascending, of the tokens that stay as they were; None if all are merged.
        score: [B, V] if the method rates tokens.
        projected: whether `tokens` are the decoder's already.
    """

    tokens: Tensor
    index: Tensor | None
    score: Tensor | None = None
    projected: bool = False


class VisionMethod(Method):
    """A method that acts between vision tower and decoder."""

    #: whether the kept tokens are those of highest score
    ranked: ClassVar[bool] = True
    #: whether it needs the question, embedded by CLIP's text tower
    reads_question: ClassVar[bool] = False

    def resolve(self, options: dict[str, Option], tower_layers: int) -> None:
        """Fill in, or refuse with an InputError, options that depend on the tower's layers up to the feature layer."""

    def stages(self, tokens: int, keep: float, leading: int, options: Mapping[str, Option]) -> tuple[Stage, ...]:
        """The static counts for `tokens` visual tokens; see `vtexport.pruning.make_plan`."""
        return (Stage(VISION, tokens, token_budget(tokens, keep, leading)),)

    def constants(self, plan: PruningPlan, grid: int) -> dict[str, np.ndarray[Any, Any]]:
        """Arrays fixed at build time that `select` reads; stored beside the weights, never traced."""
        return {}

    def select(self, state: TowerState, plan: PruningPlan, constants: Mapping[str, Tensor]) -> Pruned:
        """Choose or make `plan.patch_budget` of the V patch tokens; `index` counts patches from 0."""
        raise NotImplementedError


def prune(method: VisionMethod, plan: PruningPlan, state: TowerState, constants: Mapping[str, Tensor]) -> Pruned:
    """Apply the vision stage of `plan` to a tower's state; `constants` are `method.constants` as tensors.

    Returns:
        projected tokens [B, K, width of the decoder] and, into the unpruned sequence of visual tokens, the index of
        those that stay as they were. Leading tokens (CLS under strategy `full`) stay in front and are never rated.
    """
    import torch

    if plan.vision_stage is None:
        return Pruned(state.project(state.features if plan.leading else state.patches), None, projected=True)
    pruned = method.select(state, plan, constants)
    # The projector works token by token: after pruning it yields the same and costs less.
    tokens = pruned.tokens if pruned.projected else state.project(pruned.tokens)
    index = pruned.index
    if plan.leading:
        tokens = torch.cat([state.project(state.features[:, :1]), tokens], dim=1)
        if index is not None:
            index = torch.cat([torch.zeros_like(index[:, :1]), index + 1], dim=1)
    return Pruned(tokens, index, pruned.score, projected=True)
