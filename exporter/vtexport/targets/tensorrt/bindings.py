"""The Python bindings of full TensorRT or of TensorRT for RTX. They share one API, so one code path serves both.

The names used in this package are those of TensorRT 10.13 to 11.x and of TensorRT for RTX 1.7.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vtexport.errors import TargetError

# TensorRT warns so about every int64 input; vtexport feeds int64, so there is nothing for the user to do.
_BINDING = re.compile(r"Make sure input \S+ has Int64 binding")


@dataclass(frozen=True)
class Bindings:
    """A TensorRT module, and the logger that it was given."""

    trt: Any
    logger: Any

    @property
    def version(self) -> str:
        """TensorRT's version, such as 11.4.0.106."""
        return str(self.trt.__version__)

    @property
    def first_error(self) -> str:
        """The first error that was logged since `begin`."""
        errors: list[str] = self.logger.errors
        return errors[0] if errors else "no reason given"


@functools.cache
def bindings(package: str) -> Bindings:
    """The bindings in `package`, "tensorrt" or "tensorrt_rtx_bindings".

    TensorRT keeps one logger per process, the first that it is given: this one.

    Raises:
        TargetError: the package, or a library that it needs, is missing.
    """
    try:
        trt = import_module(package)
    except (ImportError, OSError) as error:
        raise TargetError(f"{package} cannot be imported ({error}); install TensorRT's Python package") from error

    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
        """Keeps errors for exceptions, and passes each warning on once."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warn: Callable[[str], None] = lambda _text: None
            self._said: set[str] = set()

        def begin(self, warn: Callable[[str], None] = lambda _text: None) -> None:
            """Begin a piece of work, whose warnings go to `warn`."""
            self.errors, self.warn, self._said = [], warn, set()

        def log(self, severity: Any, message: str) -> None:
            text = " ".join(message.split())
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(text)
            elif severity == trt.ILogger.WARNING and text not in self._said and not _BINDING.search(text):
                self._said.add(text)
                self.warn(f"TensorRT: {text}")

    return Bindings(trt, Logger())
