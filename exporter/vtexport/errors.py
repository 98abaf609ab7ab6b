"""Every exception vtexport raises on purpose.

    VtexportError                 anything below; the command line prints it in one line and exits with 2
    ├── InputError                something the user gave is wrong: a file, a value, a prompt
    ├── ModelError                the checkpoint is not one vtexport can read
    ├── BundleError               the engine folder is damaged, incomplete or of another version
    ├── TargetError               the target cannot build or run here
    │   └── MissingDependencyError  a package of an extra is not installed
    ├── VerificationError         a built engine differs from the reference model
    ├── NumericError              an engine computed NaN or infinity, of which no answer can be made
    └── StorageError              a file cannot be written: disk full, read-only, no permission

Messages are one line: what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import re

# The line ends that `str.splitlines` knows, with the space around them.
_BREAK = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


class VtexportError(Exception):
    """The root of all errors below. `str(error)` is one printable line that ends with the remedy."""

    def __str__(self) -> str:
        # Messages quote files and names that anyone may have written.
        return printable(_BREAK.sub(" ", super().__str__()))


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


class NumericError(VtexportError):
    """An engine computed NaN or infinity, of which no answer can be made.

    Attributes:
        fault: what was seen, and in which stage.
        row: the number of the question in what was asked together.
    """

    def __init__(self, fault: str, row: int = 0) -> None:
        which = f" for question {row + 1} of those asked together" if row else ""
        super().__init__(
            f"{fault}{which}, so there is no answer; build the bundle with --dtype fp32 (or bf16 on a TensorRT target), and "
            "if it is fp32 already, check its files with vtexport inspect --verify"
        )
        self.fault = fault
        self.row = row


class StorageError(VtexportError):
    """A file cannot be written: the disk is full or read-only, or permission is missing."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not blank, or the name of its type if there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def cut(text: str) -> str:
    """`text`, short enough to be quoted in a line."""
    return text if len(text) <= 60 else f"{text[:60]}…"


#: what a terminal acts upon or shows out of order: control characters (C0, DEL and C1), marks that force the
#: direction of text, separators of lines and paragraphs, and halves of surrogate pairs, which have no encoding
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Text from outside as a terminal may get it: what it would act upon is escaped, as in Python's strings.

    Names, prompts and answers may come from anyone: none of them may move the cursor, colour what follows, set a
    window's title or make a line read otherwise than it is.

    Args:
        text: any text.
        keep: control characters to leave as they are, such as a newline.
    """

    def escaped(found: re.Match[str]) -> str:
        character = found.group()
        return character if character in keep else character.encode("unicode_escape").decode("ascii")

    return _UNPRINTABLE.sub(escaped, text)
