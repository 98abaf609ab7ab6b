"""How the process is stopped from outside: signals become an exception, held back while a result is put in place."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

#: Ctrl-C, what `timeout` and service managers send, and a terminal that closes
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Stopped(BaseException):
    """A signal asks the process to stop.

    It is no `KeyboardInterrupt`, of which click prints a line of its own, and no `Exception`, which would be handled as
    an error on its way.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Stopping:
    """In its block, signals raise `Stopped` in the main thread, so that whatever cleans up does so.

    Attributes:
        number: the signal that came, or 0. Libraries sometimes turn the exception into one of their own.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # What is ignored, as under nohup, stays ignored.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.number = self.number or number
        raise Stopped(number)

    def end(self) -> None:
        """Ignore further signals: the process is about to end."""
        for number in self._before:
            signal.signal(number, _ignore)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    pass


def ignore() -> None:
    """Ignore what stops the process, for good: it has done its work and is ending."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back signals until the block is done; for steps that must not end half-way, such as cleaning up.

    In another thread than the main one it does nothing: no handler runs there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers: dict[int, Callable[..., Any]] = {}
    try:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, lambda number, _frame: arrived.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def die_with(parent: int) -> None:
    """End this process when its parent, the process `parent`, does, even if that is killed; where Linux runs.

    The parent's thread that started this process must live as long as the parent should.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    # It may have died before.
    if os.getppid() != parent:
        os._exit(1)
