"""What tests of TensorRT's targets share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.targets.tensorrt_llm_stand_in import installed
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


@pytest.fixture
def tensorrt_llm() -> Iterator[ModuleType]:
    """The stand-in in TensorRT-LLM's place, new for every test."""
    with installed() as module:
        yield module


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random decoders without images."""
    from tests.targets.tensorrt_llm_stand_in.decoders import CONFIGS, write_decoder

    return {name: write_decoder(name, tmp_path_factory.mktemp(name)) for name in CONFIGS}


@pytest.fixture(scope="session")
def answers(decoders: dict[str, Path]) -> dict[str, list[list[int]]]:
    """What transformers generates with them."""
    from tests.targets.tensorrt_llm_stand_in.decoders import generated

    return {name: generated(folder) for name, folder in decoders.items()}
