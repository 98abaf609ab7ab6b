"""Attributes that a model's parts share while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

_state = SimpleNamespace(extra=None, compiling=False)
_globals = SimpleNamespace(attention_metadata=None)


def get_model_extra_attrs() -> dict | None:
    """The running model's attributes."""
    return _state.extra


def get_global_attrs() -> SimpleNamespace:
    """Attributes for use outside an executor."""
    return _globals


@contextlib.contextmanager
def model_extra_attrs(attrs: dict) -> Iterator[None]:
    """Make `attrs` the running model's."""
    before, _state.extra = _state.extra, attrs
    try:
        yield
    finally:
        _state.extra = before


def is_torch_compiling() -> bool:
    """Whether torch.compile is on; then attention takes its metadata from the attributes, not from its caller."""
    return _state.compiling


def set_torch_compiling(enable: bool) -> None:
    """Turn torch.compile's way of calling attention on or off."""
    _state.compiling = enable
