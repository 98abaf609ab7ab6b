"""Calibrations: measurements that schedules rest on, made once per model by `vtexport.measure.calibrate`."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vtexport.errors import InputError
from vtexport.pruning.adaptive import AdaptiveTable
from vtexport.writing import write_whole

#: singular values below this share of the greatest do not count towards the rank
RANK_TOLERANCE = 0.01


@dataclass(frozen=True)
class Calibration:
    """Measurements of the dense model over pairs of image and prompt.

    Attributes:
        model: fingerprint of the checkpoint (`vtexport.models.names.fingerprint`).
        num_visual_tokens: V.
        pairs: number of pairs measured.
        ranks: for each decoder layer, the mean numerical rank of the raters x visual attention (head mean), counting
            singular values of at least `RANK_TOLERANCE` of the greatest.
        rank_spread: for each decoder layer, the standard deviation of this rank over the pairs.
        mass: for each decoder layer, the mean share of a rater's attention that falls on visual tokens.
        keeps: keep ratios for which pruning layers were tried.
        layers: for each of these ratios, the pruning layers with which sparsevlm gave the dense model's next token the
            greatest likelihood.
        agreement: for each of these ratios and with these layers, the share of pairs whose greedy next token stayed the
            same.
        exit_layer: the earliest layer after which dropping every visual token changed the greedy next token of at most
            a share `exit_tolerance` of the pairs.
        exit_tolerance: that share.
        adaptive: the tables that `--keep auto` rests on, one per method.
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
        """The layers to prune after for `keep`: those that did best at the tried ratio nearest to it on a log scale."""
        place = min(range(len(self.keeps)), key=lambda i: abs(math.log(self.keeps[i] / keep)))
        return self.layers[place]

    def to_toml(self) -> str:
        """What `save` writes."""
        about = "# Written by vtexport calibrate; see vtexport.pruning.calibration for what the values are.\n"
        return about + msgspec.toml.encode(self).decode()

    def save(self, path: Path) -> None:
        """Write it as TOML, whole or not at all.

        Raises:
            StorageError: the file cannot be written.
        """
        write_whole(path, self.to_toml())

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or not a calibration.
        """
        try:
            calibration = msgspec.toml.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise InputError(f"{path}: no such calibration file; write one with vtexport calibrate") from error
        except (tomllib.TOMLDecodeError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a calibration ({error}); write it anew with vtexport calibrate") from error
        lengths = [
            {len(calibration.ranks), len(calibration.rank_spread), len(calibration.mass)},
            {len(calibration.keeps), len(calibration.layers)},
        ]
        for table in calibration.adaptive:
            lengths += [{len(table.keeps), len(table.agreement)}, {len(table.spread), *map(len, table.agreement)}]
        if any(len(same) != 1 for same in lengths) or not calibration.keeps:
            raise InputError(f"{path} has lists of unequal length; write it anew with vtexport calibrate")
        return calibration

    def check(self, path: Path, model: str, num_visual_tokens: int, num_layers: int) -> None:
        """Refuse a model other than the measured one.

        Raises:
            InputError: the model is another one.
        """
        if (self.num_visual_tokens, len(self.ranks)) != (num_visual_tokens, num_layers):
            raise InputError(
                f"{path} was calibrated on a model of {self.num_visual_tokens} visual tokens and {len(self.ranks)} "
                f"layers, this one has {num_visual_tokens} and {num_layers}; calibrate this model"
            )
        if self.model != model:
            raise InputError(f"{path} was calibrated on another checkpoint of this size; calibrate this one")
