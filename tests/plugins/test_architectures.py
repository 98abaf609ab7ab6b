"""Which GPUs an installation's CUDA kernels run on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vtexport.native import kernels as native


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 0), False),  # older than all
        ((7, 2), False),
        ((7, 5), True),
        ((8, 0), True),
        ((8, 6), True),  # by the code for 80
        ((9, 0), True),  # by the PTX of 90
        ((10, 3), True),
        ((12, 1), True),
        ((13, 0), True),
    ],
)
def test_code_runs_on_later_minor_numbers_and_ptx_on_everything_later(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(native, "_cuda", SimpleNamespace(ARCHITECTURES="75,80,120", PTX="120,90"))
    assert native.architectures() == ((75, 80, 120), (120, 90))
    assert native.runs_on(capability) is runs


def test_code_alone_does_not_run_on_another_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cuda", SimpleNamespace(ARCHITECTURES="86", PTX="120"))
    assert [native.runs_on(one) for one in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))] == [
        False,
        True,
        True,
        False,
        True,
    ]


def test_without_kernels_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cuda", None)
    assert native.architectures() == ((), ())
    assert not native.runs_on((9, 0))
