"""Calibrated ranks: what the rank-based schedule rests on, measured once a model (`vtexport.measure.calibrate`) and kept."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vtexport.errors import InputError
from vtexport.pruning.adaptive import AdaptiveTable

#: singular values below this share of the greatest do not count into the rank
RANK_TOLERANCE = 0.01


@dataclass(frozen=True)
class Calibration:
    """Measurements of the dense model over image and prompt pairs, a value a decoder layer where not said otherwise.

    Attributes:
        model: fingerprint of the checkpoint (`vtexport.models.names.fingerprint`).
        num_visual_tokens: V.
        pairs: number of pairs measured.
        ranks: mean numerical rank of the raters x visual attention (head mean), singular values at least
            `RANK_TOLERANCE` of the greatest.
        rank_spread: its standard deviation over the pairs.
        mass: mean share of a rater's attention that falls on visual tokens.
        keeps: keep ratios for which pruning layers were tried.
        layers: for each of them, the pruning layers under which sparsevlm's next token was likeliest to be the dense
            model's.
        agreement: with these layers, the share of pairs whose greedy next token stayed the same.
        exit_layer: the earliest layer after which dropping every visual token changed no greedy next token, up to
            `exit_tolerance`; one number.
        exit_tolerance: share of the pairs whose next token might change; one number.
        adaptive: what `--keep auto` rests on, a table a method.
    """

    model: str
    num_visual_tokens: int
    pairs: int
    ranks: tuple[float, ...]
    rank_spread: tuple[float, ...]
    mass: tuple[float, ...]
    keeps: tuple[float, ...]
    layers: tuple[tuple[int, ...], ...]
    agreement: tuple[float, ...]
    exit_layer: int
    exit_tolerance: float
    adaptive: tuple[AdaptiveTable, ...] = ()

    def pruning_layers(self, keep: float) -> tuple[int, ...]:
        """The layers to prune after for `keep`: those that did best at the nearest ratio tried, as ratios go."""
        place = min(range(len(self.keeps)), key=lambda i: abs(math.log(self.keeps[i] / keep)))
        return self.layers[place]

    def save(self, path: Path) -> None:
        """Write it as TOML."""
        about = "# Written by vtexport calibrate; see vtexport.pruning.calibration for what the values are.\n"
        path.write_text(about + msgspec.toml.encode(self).decode(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or not a calibration.
        """
        try:
            found = msgspec.toml.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise InputError(f"{path}: no such calibration file; write one with vtexport calibrate") from error
        except (tomllib.TOMLDecodeError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a calibration ({error}); write it anew with vtexport calibrate") from error
        lengths = [{len(found.ranks), len(found.rank_spread), len(found.mass)}, {len(found.keeps), len(found.layers)}]
        for table in found.adaptive:
            lengths += [{len(table.keeps), len(table.agreement)}, {len(table.spread), *map(len, table.agreement)}]
        if any(len(same) != 1 for same in lengths) or not found.keeps:
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
