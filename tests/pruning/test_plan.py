"""Plans: counts that are fixed, exact and monotone."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtexport.bundle.manifest import PlanEntry
from vtexport.errors import InputError
from vtexport.pruning import METHODS, Geometry, PruningPlan, Stage, choose, make_plan
from vtexport.pruning.pool import pool_grid

grids = st.integers(2, 30)
keeps = st.floats(0.01, 1.0)


@given(grid=grids, keep=keeps, leading=st.integers(0, 1), method=st.sampled_from(["fastervlm", "random"]))
def test_budget_is_the_rounded_share(grid: int, keep: float, leading: int, method: str) -> None:
    tokens = grid * grid + leading
    wanted = math.floor(keep * tokens + 0.5)
    if wanted < leading + 1:
        with pytest.raises(InputError, match="the least for this model"):
            make_plan(method, Geometry(tokens, 4, leading), keep=keep)
        return
    plan = make_plan(method, Geometry(tokens, 4, leading), keep=keep)
    assert plan.vision_tokens == wanted
    assert plan.per_layer == (wanted,) * 4
    assert plan.mean_visual_tokens == wanted


@given(grid=grids, keep=keeps)
def test_pool_never_exceeds_its_budget_and_wastes_less_than_a_row(grid: int, keep: float) -> None:
    tokens = grid * grid
    budget = math.floor(keep * tokens + 0.5)
    if budget == 0:
        return
    plan = make_plan("pool", Geometry(tokens, 4), keep=keep)
    rows, columns = pool_grid(budget, grid)
    assert plan.vision_tokens == rows * columns <= budget
    # Only a coarse grid already as wide as the patch grid cannot grow by a column.
    assert columns == grid or budget - rows * columns < rows
    assert pool_grid(plan.patch_budget, grid) == (rows, columns)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, math.nan, math.inf])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_keep_out_of_range_is_refused(keep: float, method: str) -> None:
    with pytest.raises(InputError, match="above 0 and at most 1"):
        make_plan(method, Geometry(144, 4), keep=keep)


def test_keep_too_small_names_the_least() -> None:
    with pytest.raises(InputError, match=r"--keep 0.003 leaves no image token of 144; the least .* 0.0035"):
        make_plan("fastervlm", Geometry(144, 4), keep=0.003)
    assert make_plan("fastervlm", Geometry(144, 4), keep=0.0035).vision_tokens == 1


def test_halves_round_up() -> None:
    # Python's round() would give 72 for 72.5: METHODS' round(r·V) means the school's rule.
    assert make_plan("fastervlm", Geometry(145, 4), keep=0.5).vision_tokens == 73


def test_options_that_cannot_take_effect_are_refused() -> None:
    with pytest.raises(InputError, match="--seed has no effect with method fastervlm"):
        make_plan("fastervlm", Geometry(144, 4), keep=0.5, options={"seed": 1})
    with pytest.raises(InputError, match="has no effect with method dense"):
        make_plan("dense", Geometry(144, 4), keep=0.5)
    with pytest.raises(InputError, match="unknown method 'nope'; choose one of"):
        make_plan("nope", Geometry(144, 4), keep=0.5)


def test_plans_that_contradict_themselves_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="impossible stage"):
        Stage("vision", 10, 11)
    with pytest.raises(ValueError, match="impossible stage"):
        Stage("vision", 10, 0)
    with pytest.raises(ValueError, match="takes 9 tokens but 10 reach it"):
        PruningPlan(choose("fastervlm", {}), 0.5, 10, 2, stages=(Stage("vision", 9, 5),))


def test_random_is_its_seed() -> None:
    def indices(seed: int) -> list[int]:
        plan = make_plan("random", Geometry(144, 4), keep=0.25, options={"seed": seed})
        return plan.methods.vision.constants(plan, 12)["index"].tolist()

    assert indices(0) == indices(0) != indices(1)
    assert indices(3) == sorted(set(indices(3)))
    assert len(indices(3)) == 36


SEVERAL: list[tuple[str, float | None, dict[str, object]]] = [
    *((name, 0.5, {}) for name in METHODS if name not in ("dense", "cdpruner")),
    ("dense", None, {}),
    ("cdpruner", 0.5, {"clip": "somewhere"}),
    ("sparsevlm", None, {"schedule": "sparsevlm-192"}),
    ("sparsevlm-plus", None, {"schedule": "sparsevlm-plus-64"}),
    ("sparsevlm", 0.5, {"recycle": False}),
    ("exit", None, {"layers": "3"}),
    ("fastervlm+sparsevlm", 0.3, {"vision_keep": 0.6, "merge": "sum"}),
]


@pytest.mark.parametrize(("method", "keep", "options"), SEVERAL, ids=str)
def test_a_manifest_gives_the_plan_back(method: str, keep: float | None, options: dict[str, object]) -> None:
    plan = make_plan(method, Geometry(576, 32), keep=keep, options=options)
    entry = msgspec.json.decode(msgspec.json.encode(PlanEntry.of(plan)), type=PlanEntry)
    assert entry.plan() == plan
