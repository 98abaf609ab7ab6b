"""`--keep auto` on paper: the spread that chooses, the table it rests on, the policy that comes of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtexport.builder.options import BuildOptions
from vtexport.errors import InputError
from vtexport.measure.calibrate import Trials
from vtexport.options import parse_options
from vtexport.pruning import Geometry, PruningPlan, make_plan
from vtexport.pruning.adaptive import AdaptiveTable, Policy, solve_policy
from vtexport.pruning.calibration import Calibration
from vtexport.pruning.ops import spread

KEEPS = (0.5, 0.25, 0.125)


def plans() -> list[PruningPlan]:
    return [make_plan("fastervlm", Geometry(144, 12), keep=keep) for keep in KEEPS]


def table(agreement: list[list[float]]) -> AdaptiveTable:
    bins = len(agreement[0])
    return AdaptiveTable("fastervlm", KEEPS, tuple(float(i + 1) for i in range(bins)), tuple(map(tuple, agreement)))


def test_spread_counts_patches() -> None:
    alike, one, two = torch.full((1, 9), 0.3), torch.eye(9)[:1], torch.eye(9)[:1] + torch.eye(9)[3:4]
    assert spread(torch.cat([alike, one, two])).tolist() == pytest.approx([9, 1, 2])


def test_a_lower_spread_gets_fewer_tokens() -> None:
    policy = Policy((9.0, 4.0), 0.9, 0.95)
    assert policy.choose(np.array([3.0, 4.0, 4.1, 9.0, 9.1, 140.0])).tolist() == [2, 2, 1, 1, 0, 0]


shares = st.sampled_from([0.5, 0.75, 0.875, 1.0])


@given(rows=st.lists(st.lists(shares, min_size=4, max_size=4), min_size=3, max_size=3), target=shares)
def test_the_policy_is_the_cheapest_that_reaches_the_target(rows: list[list[float]], target: float) -> None:
    tokens = [plan.mean_visual_tokens for plan in plans()]
    # Every choice of a plan a bin that never gives more tokens to a lesser spread.
    every = [c for c in itertools.product(range(3), repeat=4) if list(c) == sorted(c, reverse=True)]
    fits = [c for c in every if np.mean([rows[p][b] for b, p in enumerate(c)]) >= target]
    if not fits:
        with pytest.raises(InputError, match="is out of reach: at keep"):
            solve_policy(table(rows), plans(), target)
        return
    policy = solve_policy(table(rows), plans(), target)
    chosen = policy.choose(np.array([1.0, 2.0, 3.0, 4.0]))
    assert policy.accuracy >= target
    assert policy.accuracy == pytest.approx(np.mean([rows[p][b] for b, p in enumerate(chosen)]), abs=1e-4)
    assert sum(tokens[p] for p in chosen) == min(sum(tokens[p] for p in c) for c in fits)
    # Beyond what was measured an image is as the last bin's.
    assert policy.choose(np.array([0.5, 144.0])).tolist()[0] == chosen[0]


def test_a_policy_for_all_images_has_no_edge() -> None:
    every, nobody = [1.0, 1.0], [0.0, 0.0]
    assert solve_policy(table([every, every, every]), plans(), 1.0).choose(np.array([1.0, 144.0])).tolist() == [2, 2]
    assert solve_policy(table([every, nobody, nobody]), plans(), 1.0).choose(np.array([1.0, 144.0])).tolist() == [0, 0]


@pytest.mark.parametrize("target", [0.0, -0.1, 1.01, float("nan")])
def test_targets_out_of_range(target: float) -> None:
    with pytest.raises(InputError, match="--target-accuracy"):
        solve_policy(table([[1.0], [1.0], [1.0]]), plans(), target)


def test_buckets() -> None:
    assert Trials.parse((), "0.125,.5,0.25", 0.0).buckets == KEEPS
    for text, message in {
        "half": "cannot be read; give a list of numbers",
        "0.5": "leaves nothing to choose from",
        "0.5,0.5": "leaves nothing to choose from",
        "0.5,2": "--keep 2 is out of range",
    }.items():
        with pytest.raises(InputError, match=message):
            Trials.parse((), text, 0.0)
        with pytest.raises(InputError, match=message):
            parse_options(BuildOptions, {"buckets": text}, "vtexport build", model="micro-llava")


def test_tables_survive_their_file(tmp_path: Path) -> None:
    found = Calibration(
        "abc",
        144,
        8,
        (2.0,),
        (0.5,),
        (0.25,),
        (0.5,),
        ((0,),),
        (1.0,),
        0,
        0.0,
        (table([[1, 0.5], [0.5, 0.5], [0, 0]]),),
    )
    found.save(tmp_path / "ranks.toml")
    assert Calibration.load(tmp_path / "ranks.toml") == found
    row = " " * 8 + "0,\n"
    text = (tmp_path / "ranks.toml").read_text().replace(2 * row, row)
    (tmp_path / "ranks.toml").write_text(text)
    with pytest.raises(InputError, match="lists of unequal length"):
        Calibration.load(tmp_path / "ranks.toml")
    (tmp_path / "ranks.toml").write_text(text.replace("spread = ", "bread = "))
    with pytest.raises(InputError, match="is not a calibration"):
        Calibration.load(tmp_path / "ranks.toml")
