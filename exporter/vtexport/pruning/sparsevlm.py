"""sparsevlm: text-guided scores, a rank-based schedule, recycling (arXiv 2410.04417, ICML 2025)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from vtexport.errors import InputError
from vtexport.options import Meta, flag_of
from vtexport.pruning.decoder import Counts, DecoderMethod, Scheduled
from vtexport.pruning.layout import Layout
from vtexport.pruning.plan import Stage
from vtexport.pruning.schedule import (
    Budget,
    Recycling,
    choose_layers,
    layers_of,
    preset_stages,
    solve,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TextGuided(DecoderMethod):
    """What both releases of SparseVLM share: text raters, pruning layers, and a schedule by ranks or a released one."""

    scores = True
    calibrated = True
    raters = "text"
    rule: Annotated[
        Literal["rank", "proportional"],
        Meta(
            description="How the kept counts follow from the calibrated ranks r: rank drops a share of what exceeds r "
            "(the paper's), proportional keeps a multiple of r."
        ),
    ] = "rank"
    schedule: Annotated[
        str,
        Meta(
            description="A released schedule in place of --keep, such as sparsevlm-192; for 576 visual tokens and 32 "
            "layers.",
            extra={"metavar": "NAME", "default": ""},
        ),
    ] = ""

    def check_given(self, given: Collection[str]) -> None:
        for name in ("layers", "rule"):
            if self.schedule and name in given:
                raise InputError(f"{flag_of(name)} has no effect with --schedule, which fixes the counts; leave it out")

    @property
    def fixes_keep(self) -> str:
        return "schedule" if self.schedule else ""

    def scheduled(self, budget: Budget) -> Scheduled:
        if self.schedule:
            stages = preset_stages(self.schedule, self.name, budget, self.recycling)
        else:
            layers = choose_layers(self.layers, budget)
            stages = solve(budget, layers, self.rule, self.recycling, self.name)
        return Scheduled(replace(self, layers=layers_of(stages)), stages)

    def choosing(self, layer: int) -> Self:
        return replace(super().choosing(layer), schedule="")

    @property
    def recycling(self) -> Recycling | None:
        """How dropped tokens are merged; None if they are not."""
        return None

    def rating_rows(self, visual: Tensor, text: Tensor, layout: Layout) -> Tensor:
        from vtexport.pruning.raters import text_raters

        return text_raters(visual, text, layout.after_image(), layout.present())


@dataclass(frozen=True)
class SparseVLM(TextGuided):
    """The visual tokens that the prompt's text raters attend to most, at a few decoder layers.

    Dropped tokens are recycled: those of highest score are merged into a few tokens, which follow the kept ones.
    """

    name = "sparsevlm"
    summary = "the visual tokens that the question's own words attend to, at a few decoder layers (arXiv 2410.04417)"
    recycle: Annotated[bool, Meta(description="Merge the best of the dropped tokens into a few.")] = True
    recycle_pool: Annotated[float, Meta(gt=0, le=1, description="Share of the dropped tokens that is merged.")] = 0.3
    recycle_clusters: Annotated[
        float, Meta(gt=0, le=1, description="Number of merged tokens, as a share of the tokens that they are made of.")
    ] = 0.1
    merge: Annotated[
        Literal["mean", "sum"],
        Meta(
            description="How tokens are merged: mean averages those that are near (the released code), sum adds up "
            "those alike by cosine (the paper)."
        ),
    ] = "mean"

    def check_given(self, given: Collection[str]) -> None:
        super().check_given(given)
        for name in ("recycle_pool", "recycle_clusters", "merge"):
            if not self.recycle and name in given:
                raise InputError(f"{flag_of(name)} has no effect with --no-recycle; leave it out")

    def choosing(self, layer: int) -> Self:
        return replace(super().choosing(layer), recycle=False)

    @property
    def recycling(self) -> Recycling | None:
        return Recycling(self.recycle_pool, self.recycle_clusters) if self.recycle else None

    def counts(self, stage: Stage) -> Counts:
        recycling = self.recycling
        return Counts(stage.kept, *(recycling.counts(stage.tokens_in - stage.kept) if recycling is not None else ()))

    def merged(self, hidden: Tensor, rank: Tensor, counts: Counts) -> tuple[Tensor, Tensor, Tensor]:
        from vtexport.pruning.ops import token_recycle

        return token_recycle(hidden, rank, counts.kept, counts.pool, counts.merged, self.merge == "sum")
