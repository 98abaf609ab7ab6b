"""The base class of vision-stage methods, and the code that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vtexport.errors import InputError
from vtexport.pruning.method import Method
from vtexport.pruning.plan import VISION, PruningPlan, Stage, token_budget

if TYPE_CHECKING:
    from torch import Tensor

    from vtexport.models.spec import ModelSpec


@dataclass(frozen=True)
class TowerLayer:
    """Attention of one tower layer: queries of the CLS row [B, H, 1, D] and all keys [B, H, 1 + V, D]."""

    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class TowerState:
    """The part of the vision tower's state that a method can read.

    Rows are views: a batch of b prompts with T views each has B = b · T.

    Attributes:
        features: output of the layer that yields the selected features, CLS first [B, 1 + V, C]; [B, V, C] for a
            tower without CLS.
        layers: attention of every layer up to and including that one; empty for a tower without CLS.
        scale: the factor on query · key before softmax.
        grid: patches per side; V = grid².
        project: the projector, token by token: [..., C] -> [..., width of the decoder].
        relevance: for a method that reads the question, the cosine similarity of every patch and the question in CLIP's
            shared space, [B, V] fp32.
        padding: [B, V] bool, the patches to leave out because they show nothing of the image; None for none.
    """

    features: Tensor
    layers: Sequence[TowerLayer]
    scale: float
    grid: int
    project: Callable[[Tensor], Tensor]
    relevance: Tensor | None = None
    padding: Tensor | None = None

    @property
    def patches(self) -> Tensor:
        """The features without CLS [B, V, C]."""
        return self.features[:, self.features.shape[1] - self.grid * self.grid :]

    def cls_score(self, layer: int = -1) -> Tensor:
        """Attention of CLS to the patches in `layer`, mean over heads, [B, V] fp32; -inf for padding.

        Softmax runs over all 1 + V keys, CLS's own included.
        """
        import torch

        from vtexport.pruning.ops import token_score

        query, key = self.layers[layer].query, self.layers[layer].key
        batch, keys = key.shape[0], key.shape[2]
        ones = torch.ones(batch, 1, dtype=torch.int64, device=key.device)
        score = token_score(query, key, ones * (keys - 1), ones[:, 0], self.grid * self.grid, self.scale)
        return score if self.padding is None else score.masked_fill(self.padding, -torch.inf)

    def spread(self) -> Tensor:
        """The spread of CLS attention over patches in the layer that yields the features, [B] fp32."""
        from vtexport.pruning.ops import spread

        return spread(self.cls_score())


@dataclass(frozen=True)
class Pruned:
    """A method's result.

    Attributes:
        tokens: [B, K, C].
        index: [B, K'] int32, ascending, of the tokens that stay as they were; None if all are merged.
        score: [B, V] if the method rates tokens, else None.
        projected: whether the projector has been applied to `tokens`.
        length: [B, n] int64, how many of the K tokens belong to each image, where that differs between prompts. The
            places that remain at the end hold no token, and are -1 in `index`.
    """

    tokens: Tensor
    index: Tensor | None
    score: Tensor | None = None
    projected: bool = False
    length: Tensor | None = None


@dataclass(frozen=True)
class RowOrder:
    """`vtexport.models.views.Rows` of a batch as tensors, and the newline's embedding.

    Attributes:
        sequence: [b, V] int64.
        row_start: [b, V] int64; not read if nothing is pruned.
        newline: [width of the decoder].
        images: n, images per prompt.
    """

    sequence: Tensor
    row_start: Tensor | None
    newline: Tensor
    images: int


@dataclass(frozen=True)
class VisionMethod(Method):
    """A method that acts between the vision tower and the decoder."""

    #: whether the kept tokens are those of highest score
    ranked: ClassVar[bool] = True
    #: whether it needs the vision tower's CLS token
    reads_cls: ClassVar[bool] = False
    #: whether it leaves out patches that are padding, as a sequence laid out by rows requires
    skips_padding: ClassVar[bool] = False

    @classmethod
    def check_model(cls, spec: ModelSpec) -> None:
        if cls.reads_cls and not spec.vision.class_token:
            raise InputError(
                f"method {cls.name} reads the vision tower's CLS token, and {spec.vision.kind} has none; use "
                "sparsevlm, divprune, or another that reads none"
            )
        if spec.views.newlines and not cls.skips_padding:
            raise InputError(
                f"method {cls.name} cannot tell an image's padding from its content; add --arrangement views, which "
                "leaves out the model's newlines and unpadding, or use another method"
            )

    def settled(self, tower_layers: int) -> VisionMethod:
        """The method with those options filled in that depend on the number of tower layers up to the feature layer.

        Raises:
            InputError: an option that this tower does not allow.
        """
        return self

    @property
    def companion(self) -> str:
        """The CLIP checkpoint (a folder or a hub id) whose text tower reads the question; "" for none."""
        return ""

    def stages(self, tokens: int, keep: float, leading: int) -> tuple[Stage, ...]:
        """The static counts for `tokens` visual tokens; see `vtexport.pruning.make_plan`."""
        return (Stage(VISION, tokens, token_budget(tokens, keep, leading)),)

    def constants(self, plan: PruningPlan, grid: int) -> dict[str, np.ndarray[Any, Any]]:
        """Arrays fixed at build time that `select` reads; stored beside the weights, never traced."""
        return {}

    def select(self, state: TowerState, plan: PruningPlan, constants: Mapping[str, Tensor]) -> Pruned:
        """Choose `plan.patch_budget` of the V patch tokens, or merge into as many; `index` counts patches from 0."""
        raise NotImplementedError


def prune(
    plan: PruningPlan,
    state: TowerState,
    constants: Mapping[str, Tensor],
    rows: RowOrder | None = None,
) -> Pruned:
    """Apply the vision stage of `plan` to a tower's state; `constants` are those of its method as tensors.

    Every view is pruned by itself. Leading tokens (CLS under strategy `full`) stay in front of their view's tokens and
    are never rated.

    Returns:
        projected tokens [b, K, width of the decoder], a prompt's views one after the other or in the order of `rows`;
        and the index, in the prompt's unpruned sequence, of the tokens that stay as they were.
    """
    if rows is not None:
        return _by_rows(plan, state, constants, rows)
    if plan.vision_stage is None:
        features = state.features if plan.leading else state.patches
        return Pruned(_joined(state.project(features), plan.views), None, projected=True)
    return _one_after_the_other(_of_views(plan, state, constants), plan, state)


def _of_views(plan: PruningPlan, state: TowerState, constants: Mapping[str, Tensor]) -> Pruned:
    """The projected tokens of every view by itself, leading ones in front."""
    import torch

    pruned = plan.methods.vision.select(state, plan, constants)
    # The projector works token by token, so after pruning it gives the same result at a lower cost.
    tokens = pruned.tokens if pruned.projected else state.project(pruned.tokens)
    index = pruned.index
    if plan.leading:
        tokens = torch.cat([state.project(state.features[:, :1]), tokens], dim=1)
        if index is not None:
            index = torch.cat([torch.zeros_like(index[:, :1]), index + 1], dim=1)
    return Pruned(tokens, index, pruned.score, projected=True)


def _one_after_the_other(pruned: Pruned, plan: PruningPlan, state: TowerState) -> Pruned:
    """The tokens of a prompt's views, one view after the other."""
    import torch

    views = plan.views
    if views == 1:
        return pruned
    index = pruned.index
    if index is not None:
        first = (plan.num_visual_tokens // views) * torch.arange(views, device=index.device, dtype=index.dtype)
        index = (index.unflatten(0, (-1, views)) + first[:, None]).flatten(1)
    score = None if pruned.score is None else _joined(pruned.score[..., None], views)[..., 0]
    return Pruned(_joined(pruned.tokens, views), index, score, projected=True)


def _joined(tokens: Tensor, views: int) -> Tensor:
    """[b · T, K, C] -> [b, T · K, C]."""
    return tokens if views == 1 else tokens.unflatten(0, (-1, views)).flatten(1, 2)


def _padding(state: TowerState, rows: RowOrder) -> Tensor:
    """Which patches are missing from the sequence, [B, V] bool."""
    import torch

    batch, patches = rows.sequence.shape[0], state.grid * state.grid
    views = state.features.shape[0] // batch
    # TensorRT scatters at most as many values as the target has places.
    places = max(views * patches + rows.images + 1, rows.sequence.shape[1])
    shown = torch.zeros(batch, places, dtype=torch.float32, device=rows.sequence.device)
    # Places without a token all name one entry, and all write the same value to it.
    shown = shown.scatter(1, rows.sequence, torch.ones_like(rows.sequence, dtype=torch.float32))
    absent: Tensor = (shown[:, : views * patches] == 0).unflatten(1, (views, patches)).flatten(0, 1)
    return absent


def _by_rows(plan: PruningPlan, state: TowerState, constants: Mapping[str, Tensor], rows: RowOrder) -> Pruned:
    """The tokens of a prompt in the order of its rows, pruned or not."""
    import torch

    num_patches = plan.views * state.grid * state.grid
    kept = _Kept(rows.sequence)
    if plan.vision_stage is not None:
        padding = _padding(state, rows)
        pruned = plan.methods.vision.select(replace(state, padding=padding), plan, constants)
        kept = _kept_of_rows(pruned, plan, padding, rows)
    joined = _joined(state.patches, plan.views)
    source = kept.sequence.clamp(max=num_patches - 1)[..., None].expand(-1, -1, joined.shape[2])
    projected = state.project(joined.gather(1, source))
    tokens = torch.where((kept.sequence < num_patches)[..., None], projected, rows.newline)
    return Pruned(tokens, kept.place, kept.score, projected=True, length=kept.length)


@dataclass(frozen=True)
class _Kept:
    """The part of a sequence by rows that stays: its entries, their places, their number per image, and the scores."""

    sequence: Tensor
    place: Tensor | None = None
    length: Tensor | None = None
    score: Tensor | None = None


def _kept_of_rows(pruned: Pruned, plan: PruningPlan, padding: Tensor, rows: RowOrder) -> _Kept:
    """The places of the patches that stay, and of each newline whose row has one of them."""
    import torch

    from vtexport.pruning.choices import marked, places_of

    assert rows.row_start is not None, "a pruned sequence says where its rows start"
    assert pruned.index is not None, "a method that skips padding keeps tokens as they are"
    patches, sequence = padding.shape[1], rows.sequence
    chosen = marked(pruned.index, patches) & ~padding
    stay = _joined(chosen[..., None].float(), plan.views)[..., 0]
    stay = torch.cat([stay, torch.zeros_like(stay[:, : rows.images + 1])], dim=1)
    # How many stay up to each place, less those before its start. A patch starts at itself, a newline with its row, so
    # the difference is above 0 where the patch, or any patch of the newline's row, stays.
    upto = stay.gather(1, sequence).cumsum(dim=1)
    before = torch.cat([torch.zeros_like(upto[:, :1]), upto], dim=1).gather(1, rows.row_start)
    stays = upto - before > 0
    place, image = places_of(stays, plan.vision_tokens), _image_of(sequence, plan, rows, patches)
    length = torch.stack([(stays & (image == i)).sum(dim=1) for i in range(rows.images)], dim=1)
    present = torch.arange(plan.vision_tokens, device=place.device) < length.sum(dim=1, keepdim=True)
    score = None if pruned.score is None else _joined(pruned.score[..., None], plan.views)[..., 0]
    return _Kept(sequence.gather(1, place), torch.where(present, place, -1).to(torch.int32), length, score)


def _image_of(sequence: Tensor, plan: PruningPlan, rows: RowOrder, patches: int) -> Tensor:
    """The image whose token stands at each place of a sequence by rows, [b, V]; n where there is none."""
    import torch

    num_patches, per_image = plan.views * patches, plan.views // rows.images * patches
    return torch.where(sequence < num_patches, sequence // per_image, sequence - num_patches)
