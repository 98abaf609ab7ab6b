"""Every exception vtexport raises on purpose.

    VtexportError                 anything below; the command line prints it in one line and exits with 2
    ├── InputError                something the user gave is wrong: a file, a value, a prompt
    ├── ModelError                the checkpoint is not one vtexport can read
    ├── BundleError               the engine folder is damaged, incomplete or of another version
    ├── TargetError               the target cannot build or run here
    │   └── MissingDependencyError  a package of an extra is not installed
    ├── VerificationError         a built engine differs from the reference model
    └── StorageError              a file cannot be written: disk full, read-only, no permission

Messages are one line: what is wrong, where, and what to do about it.
"""

from __future__ import annotations


class VtexportError(Exception):
    """The root of all errors below. `str(error)` is one line that ends with the remedy."""


class InputError(VtexportError):
    """Something the user gave is wrong: a file, a value, a prompt."""


class ModelError(VtexportError):
    """The checkpoint is not one that vtexport can read."""


class BundleError(VtexportError):
    """The engine folder is damaged, incomplete or of another schema version."""


class TargetError(VtexportError):
    """The target cannot build or run on this machine."""


class MissingDependencyError(TargetError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'vtexport[{extra}]'")
        self.package = package
        self.extra = extra


class VerificationError(VtexportError):
    """A built engine differs from the reference model."""


class StorageError(VtexportError):
    """A file cannot be written: the disk is full or read-only, or permission is missing."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]
