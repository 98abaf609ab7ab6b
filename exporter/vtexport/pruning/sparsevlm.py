"""sparsevlm: text-guided scores, a rank-based schedule, recycling (arXiv 2410.04417, ICML 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from vtexport.errors import InputError
from vtexport.pruning.decoder import DecoderMethod
from vtexport.pruning.layout import Layout
from vtexport.pruning.plan import Option, PruningPlan, Stage
from vtexport.pruning.schedule import (
    Budget,
    Recycling,
    choose_layers,
    preset_stages,
    solve,
)

if TYPE_CHECKING:
    from torch import Tensor


class SparseVLM(DecoderMethod):
    """Visual tokens by the attention that the prompt's text raters pay them at a few decoder layers.

    What leaves is recycled: the better part of it is merged into a few tokens behind the survivors.
    """

    name = "sparsevlm"
    summary = "the visual tokens that the question's own words attend to, at a few decoder layers (arXiv 2410.04417)"
    scores = True
    calibrated = True
    raters = "text"
    options: ClassVar[Mapping[str, Option]] = {
        "layers": "",
        "positions": "compact",
        "rule": "rank",
        "schedule": "",
        "recycle": 1,
        "recycle_pool": 0.3,
        "recycle_clusters": 0.1,
        "merge": "mean",
    }
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "positions": ("compact", "original"),
        "rule": ("rank", "proportional"),
        "merge": ("mean", "sum"),
    }

    def check_options(self, given: Mapping[str, Option]) -> None:
        for flag in ("layers", "rule"):
            if given.get("schedule") and flag in given:
                raise InputError(f"--{flag} has no effect with --schedule, which fixes the counts; leave it out")
        if not given.get("recycle", 1):
            for flag in ("recycle_pool", "recycle_clusters", "merge"):
                if flag in given:
                    raise InputError(f"--{flag.replace('_', '-')} has no effect with --no-recycle; leave it out")

    def decides_keep(self, options: Mapping[str, Option]) -> str:
        return "schedule" if options["schedule"] else ""

    def stages(self, budget: Budget, options: dict[str, Option]) -> tuple[Stage, ...]:
        recycling = self.recycling(options)
        if options["schedule"]:
            stages = preset_stages(str(options["schedule"]), self.name, budget, recycling)
        else:
            layers = choose_layers(str(options["layers"]), budget)
            stages = solve(budget, layers, str(options["rule"]), recycling, self.name)
        options["layers"] = ",".join(str(stage.layer) for stage in stages)
        return stages

    def rating_rows(self, visual: Tensor, text: Tensor, layout: Layout) -> Tensor:
        from vtexport.pruning.raters import text_raters

        return text_raters(visual, text, layout.after_image(), layout.present())

    def merge(self, hidden: Tensor, score: Tensor, stage: Stage, plan: PruningPlan) -> tuple[Tensor, Tensor, Tensor]:
        from vtexport.pruning.ops import token_recycle

        recycling = self.recycling(plan.options)
        assert recycling is not None, "a plan that recycles says how"
        pool, clusters = recycling.counts(stage.tokens_in - stage.kept)
        return token_recycle(hidden, score, stage.kept, pool, clusters, plan.options["merge"] == "sum")

    def recycling(self, options: Mapping[str, Option]) -> Recycling | None:
        """How the options say to recycle.

        Raises:
            InputError: a fraction outside (0, 1].
        """
        if not options["recycle"]:
            return None
        for name in ("recycle_pool", "recycle_clusters"):
            if not 0 < float(options[name]) <= 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {options[name]} is out of range; give a share above 0, at most 1")
        return Recycling(float(options["recycle_pool"]), float(options["recycle_clusters"]))
