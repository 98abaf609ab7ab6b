"""Plans that only choose: which plans become one, with which stage, and which are refused."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from vtexport.bundle.manifest import PlanEntry
from vtexport.errors import InputError
from vtexport.pruning import Geometry, PruningPlan, Stage, make_plan, selection_plan
from vtexport.pruning.plan import round_half_up
from vtexport.pruning.schedule import TOLERANCE
from vtexport.pruning.selection import rating_layer, selecting_stage

LLAVA_15 = Geometry(576, 32)


def made(method: str, keep: float | None, **options: object) -> PruningPlan:
    return make_plan(method, LLAVA_15, keep=keep, options=options)


PLANS: list[tuple[str, float | None, dict[str, object]]] = [
    ("sparsevlm", 0.33, {}),
    ("sparsevlm", 0.33, {"layers": "5", "recycle": False}),
    ("sparsevlm", None, {"schedule": "sparsevlm-128"}),
    ("sparsevlm-plus", None, {"schedule": "sparsevlm-plus-64"}),
    ("fastv", 0.25, {}),
    ("pyramiddrop", 0.5, {}),
    ("fastervlm+sparsevlm", 0.25, {}),
    ("visionzip+fastv", 0.2, {"vision_keep": 0.5}),
]


@pytest.mark.parametrize(("method", "keep", "options"), PLANS, ids=str)
def test_one_stage_stands_where_the_first_did_and_keeps_the_share_asked_for(
    method: str, keep: float | None, options: dict[str, object]
) -> None:
    plan = made(method, keep, **options)
    chosen = selection_plan(plan)
    stage, first = selecting_stage(chosen), min(plan.decoder_stages)
    assert stage == Stage.decoder(first, plan.vision_tokens, round_half_up(plan.keep * 576))
    assert chosen.vision_stage == plan.vision_stage
    assert (chosen.keep, chosen.methods.vision) == (plan.keep, plan.methods.vision)
    # As many as the plan itself has in the mean over its layers, but for the rounding of its schedule.
    assert stage.kept == pytest.approx(plan.mean_visual_tokens, abs=TOLERANCE + 1)
    assert rating_layer(chosen) == first + ("pyramiddrop" in method)


@pytest.mark.parametrize(("method", "keep", "options"), PLANS, ids=str)
def test_its_options_describe_it(method: str, keep: float | None, options: dict[str, object]) -> None:
    chosen = selection_plan(made(method, keep, **options))
    assert chosen.options["layers"] == str(selecting_stage(chosen).layer)
    assert not chosen.options.get("recycle")
    assert not chosen.options.get("schedule")
    assert selection_plan(chosen) == chosen
    entry = msgspec.json.decode(msgspec.json.encode(PlanEntry.of(chosen)), type=PlanEntry)
    assert entry.plan() == chosen


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (made("fastervlm", 0.25), "method fastervlm chooses no visual token in the decoder; .* such as sparsevlm"),
        (made("dense", None), "method dense chooses no visual token in the decoder"),
        (made("exit", 0.5), "method exit does not rate visual tokens"),
        (made("fastervlm+exit", 0.2), "method exit does not rate"),
        (made("sgl", 0.5), "method sgl does not rate visual tokens, .*; use one that does, such as sparsevlm"),
        (made("sparsevlm", 1.0), "--keep 1 keeps all 576 visual tokens that enter the decoder, .*; give a smaller"),
        (made("fastervlm+fastv", 0.5, vision_keep=0.5), "--keep 0.5 keeps all 288 visual tokens"),
        (replace(made("fastv", 0.25), keep=0.0005), "--keep 0.0005 leaves no image token of 576"),
    ],
    ids=lambda value: value.method if isinstance(value, PruningPlan) else "",
)
def test_plans_that_cannot_choose_are_refused(plan: PruningPlan, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        selection_plan(plan)
    assert len(str(refused.value).splitlines()) == 1
