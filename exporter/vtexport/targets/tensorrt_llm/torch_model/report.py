"""What reached the decoder, counted from the lengths that attention worked with, and checked against the plan."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from vtexport.errors import VerificationError
from vtexport.targets.tensorrt_llm.torch_model.packing import Row
from vtexport.targets.tensorrt_llm.torch_model.stages import Schedule

#: the environment variable that names a file to write reports to
VARIABLE = "VTEXPORT_REPORT"


class Report:
    """Checks every prompt's visual tokens, and writes a line of JSON for each to a file, if there is one.

    A line has `request`, TensorRT-LLM's number of it; `text`, its text tokens; and `parts`, for each run of layers
    between two stages its first layer and the visual tokens that entered it.

    Args:
        schedule: the parts of the decoder.
        path: where to; None for nowhere.
    """

    def __init__(self, schedule: Schedule, path: Path | None) -> None:
        self._schedule, self._path = schedule, path

    @classmethod
    def from_environment(cls, schedule: Schedule) -> Report:
        """A report to the file that `VTEXPORT_REPORT` names."""
        path = os.environ.get(VARIABLE)
        return cls(schedule, Path(path) if path else None)

    def add(self, rows: Sequence[Row], lengths: Callable[[int], Sequence[int]]) -> None:
        """Check and report the contexts `rows` of a step, whose rows had `lengths(part)` tokens in each part.

        Raises:
            VerificationError: another number of visual tokens than the plan's reached a part.
        """
        first = [0, *(stage + 1 for stage in self._schedule.stages)]
        lines = []
        for row in rows:
            planned = self._schedule.visual(row.images)
            seen = [lengths(part)[row.number] - row.images.text for part in range(self._schedule.parts)]
            if seen != planned:
                raise VerificationError(f"{seen} visual tokens reached the decoder's parts, the plan has {planned}")
            parts = [{"layer": layer, "visual_tokens": tokens} for layer, tokens in zip(first, seen, strict=True)]
            lines.append({"request": row.request, "text": row.images.text, "parts": parts})
        if self._path is not None and lines:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
