"""Calibrations: measurements that schedules rest on, made once per model by `vtexport.measure.calibrate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vtexport.errors import InputError
from vtexport.pruning.adaptive import AdaptiveTable
from vtexport.pruning.plan import MOST_LAYERS, MOST_TOKENS
from vtexport.reading import Unreadable, read_toml
from vtexport.writing import write_whole

#: singular values below this share of the greatest do not count towards the rank
RANK_TOLERANCE = 0.01
# Far above any model and any calibration; a policy compares all ways to give bins to plans.
_MOST_KEEPS, _MOST_BINS = 256, 64
_LEAST_KEEP = 1e-6


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
            calibration: Calibration = read_toml(path, kind=cls)
            calibration._check_numbers()
        except Unreadable as error:
            if not path.exists():
                raise InputError(f"{path}: no such calibration file; write one with vtexport calibrate") from error
            raise InputError(f"{path} is not a calibration ({error}); write it anew with vtexport calibrate") from error
        return calibration

    def _check_numbers(self) -> None:
        """Refuse what `vtexport calibrate` never writes, before anything is planned with it.

        Raises:
            Unreadable: lists of unequal length, or a number that is out of range or not finite.
        """
        tokens, last_layer = self.num_visual_tokens, len(self.ranks) - 1
        _alike([self.ranks, self.rank_spread, self.mass], MOST_LAYERS)
        _alike([self.keeps, self.layers, self.agreement], _MOST_KEEPS)
        _within("num_visual_tokens", [tokens], 1, MOST_TOKENS)
        _within("pairs", [self.pairs], 1, math.inf)
        _within("ranks", self.ranks, 0, tokens)
        _within("rank_spread", self.rank_spread, 0, tokens)
        # A share that was computed in float32 may be a little above one.
        _within("mass", self.mass, 0, 1.001)
        _within("keeps", self.keeps, _LEAST_KEEP, 1)
        _within("agreement", self.agreement, 0, 1)
        _within("exit_layer", [self.exit_layer], 0, last_layer)
        _within("exit_tolerance", [self.exit_tolerance], 0, 1)
        for layers in self.layers:
            _within("layers", layers, 0, last_layer)
            if not layers or list(layers) != sorted(set(layers)):
                raise Unreadable(f"layers {list(layers)[:10]} do not ascend")
        if len({table.method for table in self.adaptive}) != len(self.adaptive):
            raise Unreadable("two adaptive tables of one method")
        for table in self.adaptive:
            _alike([table.keeps, table.agreement], _MOST_KEEPS)
            _alike([table.spread, *table.agreement], _MOST_BINS)
            _within("keeps", table.keeps, _LEAST_KEEP, 1)
            _within("spread", table.spread, 0, MOST_TOKENS)
            if list(table.spread) != sorted(table.spread):
                raise Unreadable("spread does not ascend")
            for row in table.agreement:
                _within("agreement", row, 0, 1)

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


def _alike(lists: Sequence[Sequence[object]], most: int) -> None:
    """Refuse lists that are empty, too long or of unequal length."""
    lengths = {len(one) for one in lists}
    if len(lengths) != 1 or 0 in lengths:
        raise Unreadable("empty lists, or lists of unequal length")
    if max(lengths) > most:
        raise Unreadable(f"lists of more than {most} values")


def _within(name: str, values: Sequence[float], least: float, most: float) -> None:
    """Refuse a value outside [least, most]; nan is outside."""
    for value in values:
        if not least <= value <= most:
            raise Unreadable(f"{name} {value:g} is not within {least:g} and {most:g}")
