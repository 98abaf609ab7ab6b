"""The base class of decoder-stage methods, and the code that they share: which rows rate, and how tokens leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from vtexport.options import Meta
from vtexport.pruning.layout import Layout
from vtexport.pruning.method import Method
from vtexport.pruning.plan import PruningPlan, Stage
from vtexport.pruning.schedule import Budget

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """The attention of one layer that a method scores by: the queries of the rating rows, and all keys.

    Attributes:
        query: [B, R, H * D] after RoPE, the rows that rate.
        key: [B, S, G * D] after RoPE.
        heads: H.
        kv_heads: G.
        scale: the factor on query · key before softmax.
        places: [B, R] int64, the place of each row in the sequence, up to which it sees the keys; -1 for a row that does
            not count.
        positions: [B, S] int64, RoPE positions of the sequence.
        cos: [max_positions, D / 2], the table of RoPE's cosines.
    """

    query: Tensor
    key: Tensor
    heads: int
    kv_heads: int
    scale: float
    places: Tensor
    positions: Tensor
    cos: Tensor

    def split(self) -> tuple[Tensor, Tensor]:
        """Query [B, H, R, D] and key [B, G, S, D]."""
        size = self.query.shape[2] // self.heads
        query = self.query.unflatten(2, (self.heads, size)).transpose(1, 2)
        return query, self.key.unflatten(2, (self.kv_heads, size)).transpose(1, 2)


@dataclass(frozen=True)
class Counts:
    """How many tokens a stage keeps and merges: numbers, or extents in a graph where these are dynamic.

    Attributes:
        kept: tokens that stay as they are.
        pool: dropped tokens that are merged.
        merged: tokens that these become.
    """

    kept: int
    pool: int = 0
    merged: int = 0

    @property
    def none(self) -> bool:
        """Whether no visual token leaves the stage."""
        return self.kept == self.merged == 0


@dataclass(frozen=True)
class DecoderState:
    """The rows of a batch between two layers.

    Attributes:
        hidden: [B, S, C].
        positions: [B, S] int64.
        layout: where text and image stand.
    """

    hidden: Tensor
    positions: Tensor
    layout: Layout


@dataclass(frozen=True)
class Dropped:
    """The result of a stage.

    Attributes:
        sequence: the rows without the dropped tokens.
        index: [B, K'] int32 of kept tokens among those that entered the stage, -1 at the end of a row that has fewer;
            None if none is kept.
        score: [B, V] fp32, or None.
        cluster: [B, V] int32, the number of the merged token that each token joined, or -1; None without recycling.
    """

    sequence: DecoderState
    index: Tensor | None
    score: Tensor | None = None
    cluster: Tensor | None = None


@dataclass(frozen=True)
class Scheduled:
    """A method with all options resolved, and its stages for a budget."""

    method: DecoderMethod
    stages: tuple[Stage, ...]


#: decoder layers to prune after, as every decoder-stage method takes them
Layers = Annotated[
    str,
    Meta(
        description="Decoder layers to prune after, such as 2,6,15; auto takes those that the calibration found best.",
        extra={"metavar": "LIST|auto", "default": "by method"},
    ),
]
_POSITIONS = Meta(
    description="RoPE positions after pruning: compact renumbers the tokens that stay, original lets each keep its own."
)
#: where RoPE puts the tokens that stay
Positions = Annotated[Literal["compact", "original"], _POSITIONS]
OnlyOriginalPositions = Annotated[Literal["original"], _POSITIONS]


@dataclass(frozen=True)
class DecoderMethod(Method):
    """A method that acts on the output of decoder layers."""

    layers: Layers = ""
    positions: Positions = "compact"

    #: which text tokens rate visual tokens: the prompt's raters, its last token, or none if no attention is used
    raters: ClassVar[Literal["text", "last", "none"]] = "last"
    #: whose attention is used: the pruning layer's, or the next layer's on the pruning layer's output
    attention_of: ClassVar[Literal["own", "next"]] = "own"

    @property
    def fixes_keep(self) -> str:
        """The name of the option that fixes the counts in place of a keep ratio; "" if none does."""
        return ""

    def scheduled(self, budget: Budget) -> Scheduled:
        """The method with all options resolved, and its static counts for `budget`.

        Raises:
            InputError: an option that this budget does not allow, or a keep ratio out of reach.
        """
        raise NotImplementedError

    def choosing(self, layer: int) -> Self:
        """The method with one stage, after `layer`, that merges nothing (`vtexport.pruning.selection`)."""
        return replace(self, layers=str(layer))

    def check_prompt(self, reach: int) -> None:
        """Refuse a prompt whose last text token stands `reach` positions behind the image's first token.

        Raises:
            InputError: that is too far for the method.
        """

    def given_score(self, extras: Mapping[str, Tensor]) -> Tensor | None:
        """The scores [B, V] fp32 if the method gets them as one of its `extras`; None if it rates tokens itself."""
        return None

    def score(self, attention: Attention, layout: Layout) -> Tensor:
        """Scores [B, V] fp32: softmaxed attention to the visual tokens, mean over heads and rating rows.

        `layout` has one image; its visual tokens are the columns from its place on.
        """
        from vtexport.pruning.ops import token_score

        query, key = attention.split()
        start, count = layout.image_position[:, 0], layout.visual
        return token_score(query, key, attention.places, start, count, attention.scale)

    def rating_rows(self, visual: Tensor, text: Tensor, layout: Layout) -> Tensor | None:
        """Which text tokens rate, [B, L] bool, decided once on the decoder's input; None unless `raters` is text."""
        return None

    def counts(self, stage: Stage) -> Counts:
        """The counts of one of this method's stages."""
        return Counts(stage.kept)

    def merged(self, hidden: Tensor, rank: Tensor, counts: Counts) -> tuple[Tensor, Tensor, Tensor]:
        """Merged tokens [B, c, C], centres [B, c] int32 and clusters [B, V] int32, by rank [B, V] int32."""
        raise NotImplementedError


def counts_after(plan: PruningPlan, layer: int) -> Counts:
    """The counts of the plan's stage after `layer`; where it has none, all visual tokens stay."""
    stage = plan.decoder_stages.get(layer)
    return Counts(plan.per_layer[layer]) if stage is None else _method(plan).counts(stage)


def stage_layers(plans: Sequence[PruningPlan]) -> list[int]:
    """The layers after which any of `plans` has a stage, ascending."""
    return sorted({layer for plan in plans for layer in plan.decoder_stages})


def slots(plans: Sequence[PruningPlan], plan: PruningPlan) -> dict[str, int]:
    """The lengths that `plan`, one of `plans`, gives to the inputs that set numbers of visual tokens, by name."""
    found = {}
    for layer in stage_layers(plans):
        every = [vars(counts_after(one, layer)) for one in plans]
        for part, length in vars(counts_after(plan, layer)).items():
            if any(counts[part] for counts in every):
                found[f"slots.{part}.{layer}"] = length
    return found


def rows_that_rate(layout: Layout, raters: Tensor | None) -> tuple[Tensor, Tensor]:
    """Places [B, R] of the rows to compute, and the same with -1 for rows that do not count."""
    if raters is not None:
        places = layout.text_places()
        return places, places.masked_fill(~raters, -1)
    last = layout.last_place()[:, None]
    return last, last


def rated(method: DecoderMethod, attention: Attention, layout: Layout, raters: Tensor | None) -> Tensor:
    """Scores [B, V] fp32 by `method` of the visual tokens of all images; -inf for tokens that a row does not have."""
    import torch

    present = layout.present()
    if layout.images > 1:
        key, front = layout.images_first(attention.key)
        positions = layout.images_first(attention.positions[..., None])[0][..., 0]
        _, places = rows_that_rate(front, raters)
        attention, layout = replace(attention, key=key, positions=positions, places=places), front
    score = method.score(attention, layout)
    return score if present is None else score.masked_fill(~present, -torch.inf)


def drop(
    plan: PruningPlan,
    counts: Counts,
    sequence: DecoderState,
    rate: Callable[[], Tensor],
    forced: Tensor | None = None,
) -> Dropped:
    """Apply one decoder stage to the output of its layer.

    Args:
        plan: the plan.
        counts: those of one of its decoder stages.
        sequence: the layer's output.
        rate: gives the scores [B, V] fp32 of the stage's visual tokens; not called if none can stay.
        forced: [B, K'] indices to keep instead of those of highest score.
    """
    import torch

    from vtexport.pruning.ops import token_select

    layout = sequence.layout
    if counts.none:
        return Dropped(_without_image(plan, sequence), None)
    score = rate()
    visual = layout.visual_of(sequence.hidden)
    kept, index, rank = token_select(visual, score, counts.kept)
    if forced is not None:
        index = forced
        kept = visual.gather(1, forced.long()[..., None].expand(-1, -1, visual.shape[2]))
    visual_positions = layout.visual_of(sequence.positions[..., None])[..., 0]
    positions, cluster, of_image = visual_positions.gather(1, index.long()), None, layout.counts_of(index)
    if counts.merged:
        merged, centres, cluster = _method(plan).merged(visual, rank, counts)
        kept = torch.cat([kept, merged], dim=1)
        # A merged token takes the position of its cluster's centre.
        positions = torch.cat([positions, visual_positions.gather(1, centres.long())], dim=1)
    if of_image is not None:
        there = layout.has(index)
        if counts.merged:
            # A row that loses nothing has nothing to merge.
            loses = layout.has(torch.full_like(of_image[:, :1], counts.kept))
            order = torch.cat([there, loses.expand(-1, counts.merged)], dim=1)
            last = of_image[:, -1:] + counts.merged * loses.to(of_image.dtype)
            of_image = torch.cat([of_image[:, :-1], last], dim=1)
            kept, positions = _present_first(kept, positions, order)
        index = torch.where(there, index, torch.full_like(index, -1))
    after = replace(layout, visual=kept.shape[1], counts=of_image)
    return Dropped(_with_image(plan, sequence, kept, positions, after), index, score, cluster)


def _method(plan: PruningPlan) -> DecoderMethod:
    assert plan.methods.decoder is not None, "a plan with decoder stages has a decoder-stage method"
    return plan.methods.decoder


def _present_first(tokens: Tensor, positions: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, K, C] and their positions [B, K], those that are `there` in front."""
    from vtexport.pruning.choices import places_of, take

    place = places_of(there, there.shape[1])
    return take(tokens, place), positions.gather(1, place)


def _with_image(
    plan: PruningPlan, sequence: DecoderState, visual: Tensor, positions: Tensor, layout: Layout
) -> DecoderState:
    hidden = sequence.layout.with_visual(sequence.hidden, visual, layout)
    if plan.positions == "compact":
        return DecoderState(hidden, layout.places(), layout)
    original = sequence.layout.with_visual(sequence.positions[..., None], positions[..., None], layout)[..., 0]
    return DecoderState(hidden, original, layout)


def _without_image(plan: PruningPlan, sequence: DecoderState) -> DecoderState:
    hidden, positions = sequence.hidden, sequence.positions
    return _with_image(plan, sequence, hidden[:, :0], positions[:, :0], sequence.layout.bare())
