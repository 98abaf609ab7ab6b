"""What tests of TensorRT's targets share."""

from __future__ import annotations

import sys

import pytest

from vtexport.targets.tensorrt import full, target


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX in place of TensorRT, and a GPU to ask about."""
    from vtexport.targets.tensorrt.bindings import bindings

    rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="the extra tensorrt-rtx is not installed")
    monkeypatch.setitem(sys.modules, "tensorrt", rtx)
    monkeypatch.setattr(rtx, "__version__", "11.4.0.106")
    for module in (full, target):
        monkeypatch.setattr(module, "this_gpu", lambda: target.Device("NVIDIA Test", 89))
    bindings.cache_clear()
