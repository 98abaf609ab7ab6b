"""The parts of benchmarks/kernels.py that need no GPU: the written work, and the sets of arguments it cycles through."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import kernels
from gpu import geometry

H100 = kernels.PEAKS["H100"]


@pytest.fixture(scope="module")
def llava() -> dict[str, tuple[object, ...]]:
    """The arguments of a stage at LLaVA-1.5-7B's geometry."""
    return kernels.stage_arguments(geometry("llava-1.5-7b"), 1, 64, "cpu", torch.bfloat16)


def test_the_stage_is_sparsevlms(llava: dict[str, tuple[object, ...]]) -> None:
    query, key, places, start, visual, scale = llava["token_score"]
    assert (tuple(query.shape), tuple(key.shape), visual) == ((1, 32, 64, 128), (1, 32, 640, 128), 576)
    assert (places[0].tolist(), start.tolist(), scale) == (list(range(576, 640)), [5], 128**-0.5)
    hidden, rank, keep, pool, clusters, paper = llava["token_recycle"]
    assert (tuple(hidden.shape), keep, pool, clusters, paper) == ((1, 576, 4096), 146, 130, 14, False)
    assert sorted(rank[0].tolist()) == list(range(576))
    assert llava["token_select"][2] == 146


def test_the_written_work_is_that_of_the_kernels(llava: dict[str, tuple[object, ...]]) -> None:
    with_clusters, without = (kernels.written_work(llava, clusters) for clusters in (True, False))
    queries, keys, by_head = 2 * 32 * 64 * 128, 2 * 32 * 640 * 128, 4 * 32 * 576
    assert with_clusters["token_score"] == kernels.Work(
        2, queries + keys + 2 * by_head + 4 * 576, 2 * 32 * 64 * 640 * 128
    )
    # A second time, only the visual columns.
    assert without["token_score"].launches == 3
    assert without["token_score"].moved - with_clusters["token_score"].moved == pytest.approx(keys * 576 / 640)
    assert with_clusters["token_select"].moved == 8 * 576 + 2 * 146 * 4096 * 2
    assert with_clusters["token_recycle"].multiplied == 2 * 130 * 130 * 4096
    # No kernel can be faster than the roofline, which counts every element once.
    least = kernels.least_microseconds(llava, H100)
    for op, work in with_clusters.items():
        assert work.microseconds(*H100) - work.launches * kernels.LAUNCH_GAP >= least[op]


def test_work_adds_up() -> None:
    one, other = kernels.Work(2, 3.0e6, 1e9), kernels.Work(1, 1.0e6, 3e9)
    assert one + other == kernels.Work(3, 4.0e6, 4e9)
    # Three gaps, 4 MB at 2 TB/s, 4 GFLOP at 1 PFLOP/s.
    assert (one + other).microseconds(2e12, 1e15) == pytest.approx(3 * kernels.LAUNCH_GAP + 2 + 4)


@pytest.mark.parametrize(("cache", "touched"), [(50_000_000, 1_064_960), (50_000_000, 200_000_000), (1, 1)])
def test_a_set_of_arguments_leaves_the_cache_before_its_next_turn(cache: int, touched: int) -> None:
    number = kernels.sets_beyond(cache, touched)
    assert number >= 2
    assert (number - 1) * touched >= 2 * cache > (number - 2) * touched


@pytest.mark.parametrize(("sets", "calls", "made"), [(1, 1, 1), (3, 1, 3), (3, 100, 102), (95, 100, 190), (4, 8, 8)])
def test_calls_go_through_all_sets_in_turn(sets: int, calls: int, made: int) -> None:
    seen: list[tuple[int, str]] = []
    call, number = kernels.over_sets(
        lambda *arguments: seen.append(arguments), [(i, "and more") for i in range(sets)], calls
    )
    call()
    assert number == len(seen) == made
    assert seen == [(i % sets, "and more") for i in range(made)]
