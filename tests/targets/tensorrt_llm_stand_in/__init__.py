"""A stand-in for TensorRT-LLM's PyTorch backend that behaves as version 1.2 does, on a CPU.

`site/tensorrt_llm/` is the package as a model sees it: names and parameters are TensorRT-LLM's (`signatures.json`), the code is
ours. `server.py` runs models in the way of TensorRT-LLM's engine, and `graphs.py` records what a CUDA graph would.

Names that end in `_cuda` are tensors on the CPU. Blocks of the cache are NaN until they are written, buffers of metadata
are shared by name where TensorRT-LLM shares them, and a recorded pass runs none of the model's Python again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

#: what goes on the path; the modules beside it would hide others of their names
SITE = Path(__file__).parent / "site"


def _of(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@contextmanager
def installed(*importers: str) -> Iterator[ModuleType]:
    """Make `import tensorrt_llm` find the stand-in, new and without any model but its own; afterwards as it was before.

    Args:
        *importers: packages that import tensorrt_llm; they are forgotten, before and after.

    Yields:
        tensorrt_llm.
    """
    importers = importers or ("vtexport.targets.tensorrt_llm.torch_model",)
    kept = {name: module for name, module in sys.modules.items() if _of(name, "tensorrt_llm")}
    _forget("tensorrt_llm", *importers)
    sys.path.insert(0, str(SITE))
    try:
        import tensorrt_llm
        import tensorrt_llm._torch.models

        yield tensorrt_llm
    finally:
        sys.path.remove(str(SITE))
        _forget("tensorrt_llm", *importers)
        sys.modules.update(kept)


def _forget(*packages: str) -> None:
    for name in [name for name in sys.modules if _of(name, *packages)]:
        parent, _, child = name.rpartition(".")
        if hasattr(sys.modules.get(parent), child):
            delattr(sys.modules[parent], child)
        del sys.modules[name]
