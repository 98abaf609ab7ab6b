"""Calibrated ranks: what the rank-based schedule rests on, measured once a model (`vtexport.calibrate`) and kept."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vtexport.errors import InputError

#: singular values below this share of the greatest do not count into the rank
RANK_TOLERANCE = 0.01
_NEARLY = 0.9


@dataclass(frozen=True)
class Calibration:
    """Measurements of the dense model over image and prompt pairs, a value a decoder layer where not said otherwise.

    Attributes:
        model: fingerprint of the checkpoint (`vtexport.models.llava.fingerprint`).
        num_visual_tokens: V.
        pairs: number of pairs measured.
        ranks: mean numerical rank of the raters x visual attention (head mean), singular values at least
            `RANK_TOLERANCE` of the greatest.
        rank_spread: its standard deviation over the pairs.
        mass: mean share of a rater's attention that falls on visual tokens.
        foresight: mean share of the later layers' raters -> visual attention that falls on the quarter of visual
            tokens which this layer scores highest.
        exit_layer: the earliest layer after which dropping every visual token changed no greedy next token, up to
            `exit_tolerance`; one number.
        exit_tolerance: share of the pairs whose next token might change; one number.
    """

    model: str
    num_visual_tokens: int
    pairs: int
    ranks: tuple[float, ...]
    rank_spread: tuple[float, ...]
    mass: tuple[float, ...]
    foresight: tuple[float, ...]
    exit_layer: int
    exit_tolerance: float

    def pruning_layers(self) -> tuple[int, ...]:
        """The layers that `--layers auto` prunes after.

        The first is the earliest whose ranking foretells the later layers' nearly as well (`_NEARLY`) as the best
        layer of the first half; too early ranks blindly, too late saves little. The other two stand as deep beside
        it as SparseVLM's 6 and 15 beside 2, as far as the decoder goes.
        """
        number = len(self.foresight)
        half = self.foresight[: max(1, number // 2)]
        first = next(layer for layer, value in enumerate(half) if value >= _NEARLY * max(half))
        last = number - 2
        depth = max(first, 1)
        return tuple(sorted({min(layer, last) for layer in (first, 3 * depth, 15 * depth // 2)}))

    def save(self, path: Path) -> None:
        """Write it as TOML."""
        lines = ["# Written by vtexport calibrate; see vtexport.pruning.rank for what the values are."]
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, tuple):
                lines.append(f"{item.name} = [{', '.join(f'{entry:.4g}' for entry in value)}]")
            else:
                lines.append(f"{item.name} = {value!r}".replace("'", '"'))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or not a calibration.
        """
        try:
            data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
            values: dict[str, Any] = {k: tuple(map(float, v)) if isinstance(v, list) else v for k, v in data.items()}
            found = cls(**values)
        except OSError as error:
            raise InputError(f"{path}: no such calibration file; write one with vtexport calibrate") from error
        except (tomllib.TOMLDecodeError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a calibration ({error}); write it anew with vtexport calibrate") from error
        if len({len(found.ranks), len(found.rank_spread), len(found.mass), len(found.foresight)}) != 1:
            raise InputError(f"{path} has lists of unequal length; write it anew with vtexport calibrate")
        return found

    def check(self, path: Path, model: str, num_visual_tokens: int, num_layers: int) -> None:
        """Refuse to serve another model than the measured one.

        Raises:
            InputError: it is another.
        """
        if (self.num_visual_tokens, len(self.ranks)) != (num_visual_tokens, num_layers):
            raise InputError(
                f"{path} was calibrated on a model of {self.num_visual_tokens} visual tokens and {len(self.ranks)} "
                f"layers, this one has {num_visual_tokens} and {num_layers}; calibrate this model"
            )
        if self.model != model:
            raise InputError(f"{path} was calibrated on another checkpoint of this size; calibrate this one")
