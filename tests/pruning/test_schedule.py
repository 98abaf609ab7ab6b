"""Schedules: released presets, rules solved for a budget, and what they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import MICRO
from vtexport.errors import InputError
from vtexport.pruning import Geometry, PruningPlan, Stage, choose, make_plan
from vtexport.pruning.calibration import Calibration
from vtexport.pruning.schedule import PRESETS, Recycling, default_layers, parse_layers

CALIBRATED = Calibration.load(MICRO / "calibration.toml")


def plan_7b(**given: object) -> PruningPlan:
    method, geometry = str(given.pop("method", "sparsevlm")), given.pop("geometry", Geometry(576, 32))
    return make_plan(method, geometry, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "mean", "by_sparsevlm"),
    [
        ("sparsevlm-192", 206.5, 192),
        ("sparsevlm-128", 145.4, 128),
        ("sparsevlm-96", 114.1, 96),
        ("sparsevlm-64", 82.3, 64),
    ],
)
def test_released_schedules_average_to_what_their_names_say(name: str, mean: float, by_sparsevlm: int) -> None:
    plan = plan_7b(options={"schedule": name})
    assert plan.mean_visual_tokens == pytest.approx(mean, abs=0.06)
    # The authors name a schedule by the whole tokens of their own count.
    assert int(plan.mean_visual_tokens_sparsevlm) == by_sparsevlm
    assert plan.keep == pytest.approx(mean / 576, abs=1e-3)
    assert [stage.layer for stage in plan.stages] == [2, 6, 15]
    assert tuple(stage.kept for stage in plan.stages) == PRESETS[name].kept


def test_released_schedules_of_plus_recycle_nothing() -> None:
    plan = plan_7b(method="sparsevlm-plus", options={"schedule": "sparsevlm-plus-192"})
    assert [(stage.kept, stage.recycled) for stage in plan.stages] == [(300, 0), (200, 0), (118, 0)]
    assert plan.positions == "original"


GEOMETRIES = [(576, 32, None), (144, 12, None), (144, 12, CALIBRATED)]


@pytest.mark.parametrize("rule", ["rank", "proportional"])
@pytest.mark.parametrize(("tokens", "layers", "calibration"), GEOMETRIES, ids=["7b", "micro", "micro-calibrated"])
def test_every_budget_is_met_or_refused(tokens: int, layers: int, calibration: Calibration | None, rule: str) -> None:
    options = {"rule": rule, "layers": ",".join(map(str, default_layers(layers)))}
    refused: dict[int, str] = {}
    before = 0.0
    for percent in range(12, 96):
        keep = percent / 100
        try:
            plan = make_plan("sparsevlm", Geometry(tokens, layers), keep=keep, options=options, calibration=calibration)
        except InputError as error:
            refused[percent] = str(error)
            continue
        assert abs(plan.mean_visual_tokens - keep * tokens) <= 1.5
        assert plan.mean_visual_tokens >= before
        assert list(plan.per_layer) == sorted(plan.per_layer, reverse=True)
        before = plan.mean_visual_tokens
        again = make_plan("sparsevlm", Geometry(tokens, layers), keep=keep, options=options, calibration=calibration)
        assert again == plan
    # Only the smallest budgets can be out of reach: recycling gives back what the first stage must drop.
    assert set(refused) <= {12}
    ways_out = "is the least; prune at earlier --layers, or combine with a vision-stage method"
    assert all(ways_out in message for message in refused.values())


@given(
    keep=st.floats(0.05, 1.0),
    tokens=st.integers(9, 300),
    layers=st.integers(3, 40),
    method=st.sampled_from(["sparsevlm", "sparsevlm-plus", "fastv", "pyramiddrop", "exit"]),
    rule=st.sampled_from(["rank", "proportional"]),
)
def test_plans_never_grow_and_never_keep_more_than_enters(
    keep: float, tokens: int, layers: int, method: str, rule: str
) -> None:
    options = {"rule": rule} if method.startswith("sparsevlm") else {}
    try:
        plan = make_plan(method, Geometry(tokens, layers), keep=keep, options=options)
    except InputError:
        return
    assert list(plan.per_layer) == sorted(plan.per_layer, reverse=True)
    if method != "exit":
        assert abs(plan.mean_visual_tokens - keep * tokens) <= 1.5
    else:
        assert plan.mean_visual_tokens <= keep * tokens + 1e-6
        assert plan.per_layer[-1] == 0


def test_an_unreachable_budget_names_the_least_that_works() -> None:
    with pytest.raises(InputError) as refused:
        plan_7b(keep=0.2, options={"layers": "8,16"})
    least = float(str(refused.value).split("so ")[1].split(" is the least")[0])
    assert 9 / 32 < least < 0.32
    plan_7b(keep=least, options={"layers": "8,16"})
    with pytest.raises(InputError, match="out of reach"):
        plan_7b(keep=least - 2.2 / 576, options={"layers": "8,16"})
    # The two ways out that the message names.
    plan_7b(keep=0.2, options={"layers": "2,6,15"})
    plan_7b(keep=0.2, method="fastervlm+sparsevlm", options={"layers": "8,16"})


def test_recycling_counts_are_the_released_codes() -> None:
    assert Recycling().counts(276) == (83, 9)
    assert Recycling().counts(1) == (1, 1)
    assert Recycling().counts(0) == (0, 0)


def test_sparsevlm_prunes_at_its_authors_layers_scaled() -> None:
    assert default_layers(32) == (2, 6, 15)
    assert default_layers(40) == (2, 7, 18)
    assert default_layers(3) == (0, 1)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # The paper's K = 2, R = 50 %: two layers see all, thirty see half.
        ("fastv", [("decoder.1", 288)]),
        ("pyramiddrop", [("decoder.7", 288), ("decoder.15", 144), ("decoder.23", 72)]),
        ("exit", [("decoder.14", 0)]),
    ],
)
def test_the_papers_own_settings_come_out(method: str, expected: list[tuple[str, int]]) -> None:
    keep = (2 * 576 + 30 * 288) / 32 / 576 if method == "fastv" else 0.46875
    assert [(stage.where, stage.kept) for stage in plan_7b(method=method, keep=keep).stages] == expected


def test_a_combination_splits_the_keep_ratio_and_says_so() -> None:
    plan = plan_7b(method="fastervlm+sparsevlm", keep=0.25)
    assert plan.options["vision_keep"] == 0.5
    assert plan.vision_tokens == 288
    assert plan.mean_visual_tokens == pytest.approx(144, abs=1.5)
    plan = plan_7b(method="fastervlm+fastv", keep=0.25, options={"vision_keep": 0.3})
    assert plan.vision_tokens == 173


def test_methods_share_no_option_that_means_two_things() -> None:
    from vtexport.options import option_fields
    from vtexport.pruning import METHODS, DecoderMethod, VisionMethod

    vision = {name for m in METHODS.values() if issubclass(m, VisionMethod) for name in option_fields(m)}
    decoder = {name for m in METHODS.values() if issubclass(m, DecoderMethod) for name in option_fields(m)}
    assert not vision & decoder


def test_sparsevlm_plus_refuses_distances_it_cannot_weigh(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtexport.models import read_spec
    from vtexport.pruning import sparsevlm_plus

    spec = read_spec(MICRO)
    assert 144 < sparsevlm_plus.rope_reach(spec) < 2048
    geometry = Geometry(576, 32, model=spec)
    monkeypatch.setattr(sparsevlm_plus, "rope_reach", lambda _spec: 500)
    with pytest.raises(InputError, match="weighs distances below 500 positions only, and 576 visual tokens enter"):
        plan_7b(method="sparsevlm-plus", keep=0.5, geometry=geometry)
    monkeypatch.setattr(sparsevlm_plus, "rope_reach", lambda _spec: 1707)
    plan = plan_7b(method="sparsevlm-plus", keep=0.5, geometry=geometry)
    assert plan.options["reach"] == 1707
    plan.methods.decoder.check_prompt(1706)
    with pytest.raises(InputError, match="lies 1707 positions behind the image's first token"):
        plan.methods.decoder.check_prompt(1707)


def test_layers_are_numbers_in_range_once_each() -> None:
    assert parse_layers("15,2,6", 32) == (2, 6, 15)
    for text, message in (("2;6", "not a list"), ("31", "out of range"), ("-1", "out of range"), ("2,2", "twice")):
        with pytest.raises(InputError, match=message):
            parse_layers(text, 32)


def test_stages_stand_in_order_inside_the_decoder() -> None:
    with pytest.raises(ValueError, match="out of order or outside 4 layers"):
        PruningPlan(choose("sparsevlm", {}), 0.5, 9, 4, stages=(Stage.decoder(2, 9, 5), Stage.decoder(1, 5, 3)))
    with pytest.raises(ValueError, match="outside 4 layers"):
        PruningPlan(choose("sparsevlm", {}), 0.5, 9, 4, stages=(Stage.decoder(4, 9, 5),))
    with pytest.raises(ValueError, match="comes first"):
        PruningPlan(choose("sparsevlm", {}), 0.5, 9, 4, stages=(Stage.decoder(1, 9, 5), Stage("vision", 5, 3)))
    with pytest.raises(ValueError, match="a stage stands at"):
        Stage("somewhere", 9, 5)
