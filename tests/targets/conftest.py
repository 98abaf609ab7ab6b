"""What tests of TensorRT's targets share."""

from __future__ import annotations

import os
import sys

import pytest

from vtexport.targets.tensorrt import full, target


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """TensorRT for RTX in place of TensorRT, here and in the processes that compile, and a GPU to ask about."""
    from vtexport.targets.tensorrt.bindings import bindings

    rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="the extra tensorrt-rtx is not installed")
    monkeypatch.setitem(sys.modules, "tensorrt", rtx)
    monkeypatch.setattr(rtx, "__version__", "11.4.0.106")
    shim = tmp_path_factory.mktemp("stand-in") / "tensorrt.py"
    shim.write_text("from tensorrt_rtx_bindings import *\n__version__ = '11.4.0.106'\n")
    monkeypatch.setenv("PYTHONPATH", str(shim.parent), prepend=os.pathsep)
    for module in (full, target):
        monkeypatch.setattr(module, "this_gpu", lambda: target.Device("NVIDIA Test", 89))
    bindings.cache_clear()
