"""vtexport compiles vision-language models into inference engines with visual-token pruning inside.

    from vtexport import BuildOptions, Runner, build

    build(BuildOptions("micro-llava", keep=0.25), "micro")
    runner = Runner.open("micro")
    answers = runner.ask([(image, "what digit is red?")])

What this module exports is the public interface: it follows semantic versioning, as the command line does. All other
modules are internal and may change with any version. Names are imported on first use, so that `vtexport --help` starts
fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtexport.builder.build import build
    from vtexport.builder.options import BuildOptions
    from vtexport.bundle.folder import Bundle
    from vtexport.errors import (
        BundleError,
        InputError,
        MissingDependencyError,
        ModelError,
        NumericError,
        StorageError,
        TargetError,
        VerificationError,
        VtexportError,
    )
    from vtexport.models.spec import ViewChoice
    from vtexport.runtime.answer import Answer, StageReport
    from vtexport.runtime.runner import Runner

__all__ = [
    "Answer",
    "BuildOptions",
    "Bundle",
    "BundleError",
    "InputError",
    "MissingDependencyError",
    "ModelError",
    "NumericError",
    "Runner",
    "StageReport",
    "StorageError",
    "TargetError",
    "VerificationError",
    "ViewChoice",
    "VtexportError",
    "build",
]

_MODULES = {
    "Answer": "vtexport.runtime.answer",
    "BuildOptions": "vtexport.builder.options",
    "Bundle": "vtexport.bundle.folder",
    "Runner": "vtexport.runtime.runner",
    "StageReport": "vtexport.runtime.answer",
    "ViewChoice": "vtexport.models.spec",
    "build": "vtexport.builder.build",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "vtexport.errors")), name)


def __dir__() -> list[str]:
    return __all__
