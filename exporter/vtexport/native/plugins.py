"""The TensorRT plugins of the pruning ops: `libvtexport_plugins.so`, one per op, for TensorRT 10.13 and later.

Load them into a registry *before* a network is parsed; TensorRT's parser then uses the kernels in place of the ops'
function bodies. TensorRT for RTX lists them too, but its parser ends the process at a node that resolves to a plugin:
the target `tensorrt-rtx` therefore inlines every function body first, and works whether or not they are loaded.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vtexport.errors import TargetError

LIBRARY = "libvtexport_plugins.so"
NAMES = ("TokenScore", "TokenScoreHeads", "TokenSelect", "TokenRecycle")
#: of the plugins; another version has other inputs and outputs. plugins/tensorrt/ops.h states it too.
VERSION = "2"


def library() -> Path | None:
    """The plugin library of this installation, or None if it was installed without nvcc or TensorRT's headers."""
    # Native files may lie apart from the Python ones: an editable install keeps its sources where they are.
    spec = find_spec("vtexport._cuda")
    places = [Path(__file__).parents[1]] + ([Path(spec.origin).parent] if spec is not None and spec.origin else [])
    return next((place / LIBRARY for place in places if (place / LIBRARY).is_file()), None)


def load(registry: Any, path: Path | None = None) -> None:
    """Register the plugins.

    Args:
        registry: `tensorrt.get_plugin_registry()`.
        path: the library; None takes this installation's.

    Raises:
        TargetError: there is no library, the registry does not take it, or it holds plugins of another version.
    """
    file = library() if path is None else path
    if file is None or not file.is_file():
        raise TargetError(
            f"no {LIBRARY if path is None else path}; install vtexport from source with nvcc and TENSORRT_ROOT set to a "
            "TensorRT SDK, or give the path of such a library"
        )
    if _known(registry).issuperset(NAMES):
        return
    registry.load_library(str(file))
    missing = set(NAMES) - _known(registry)
    if missing:
        raise TargetError(
            f"{file} registers no {', '.join(sorted(missing))}; build it again from this version's source"
        )


def _known(registry: Any) -> set[str]:
    """Which of the plugins are registered; an older one would read other inputs than graphs of this version have."""
    known = set()
    for creator in registry.all_creators:
        if creator.name not in NAMES:
            continue
        if creator.plugin_version != VERSION:
            raise TargetError(
                f"this process has loaded version {creator.plugin_version} of the plugin {creator.name}, and graphs of this "
                f"vtexport need version {VERSION}; load no other {LIBRARY}"
            )
        known.add(creator.name)
    return known
