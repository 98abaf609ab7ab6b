"""What every pruning method has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vtexport.pruning.plan import Option


class Method:
    """To add one: a subclass of `VisionMethod` or `DecoderMethod` in a file of its own, listed in `METHODS`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    #: names and defaults of the options that the method takes
    options: ClassVar[Mapping[str, Option]] = {}
    #: options that are one of a few words
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    #: whether the method rates tokens, so that a debug build has scores to give out
    scores: ClassVar[bool] = False
