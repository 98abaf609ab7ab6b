"""Reports as pictures, drawn by matplotlib, which the extra `plots` installs."""

from __future__ import annotations

import io
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vtexport.errors import InputError, MissingDependencyError
from vtexport.measure.profile import STAGES, Report
from vtexport.pruning.calibration import Calibration
from vtexport.writing import check_file

#: the formats that matplotlib draws in with nothing but what it brings itself
FORMATS = ("png", "svg", "pdf", "jpg", "jpeg", "webp", "tif", "tiff")


def check_plot(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse, before any work, a plot that cannot be drawn; `inputs` as in `vtexport.writing.check_file`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InputError: the suffix of `path` names no format of a plot, or see `check_file`.
        StorageError: see `check_file`.
    """
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("matplotlib", extra="plots")
    if _format(path) not in FORMATS:
        raise InputError(f"{path}: unknown image format; give a name that ends in .png, .svg or .pdf")
    check_file(path, "--plot", inputs)


def _format(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _drawn(figure: Any, path: Path, dpi: int) -> bytes:
    """The file of a figure, in the format that the suffix of `path` asks for."""
    file = io.BytesIO()
    figure.savefig(file, format=_format(path), dpi=dpi)
    return file.getvalue()


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def profile_plot(report: Report, path: Path) -> bytes:
    """The medians as bars, one row per stage, in the format of `path` (see `check_plot`)."""
    pyplot = _pyplot()
    sides = [side for side in (report.this, report.against) if side is not None]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    stages = [stage for stage in STAGES if stage in report.this.stages]
    height = 0.8 / len(sides)
    for number, side in enumerate(sides):
        places = [i + number * height for i in range(len(stages))]
        medians = [side.stages[stage].median for stage in stages]
        spread = [side.stages[stage].p90 - side.stages[stage].median for stage in stages]
        label = f"{side.method}, keep {side.keep:g} ({side.mean_visual_tokens:g} visual tokens)"
        bars = axes.barh(places, medians, height * 0.92, xerr=[[0] * len(spread), spread], label=label)
        axes.bar_label(bars, fmt="%.2f", padding=6)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(stages))], [s.replace("_", " ") for s in stages])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(f"median ms, whisker to p90; batch {report.batch}, {report.runs} runs; {report.device}")
    axes.legend(loc="lower right")
    drawn = _drawn(figure, path, dpi=150)
    pyplot.close(figure)
    return drawn


def calibration_plot(calibration: Calibration, path: Path) -> bytes:
    """Rank and attention mass by layer, in the format of `path` (see `check_plot`)."""
    pyplot = _pyplot()
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    layers = range(len(calibration.ranks))
    upper.errorbar(layers, calibration.ranks, yerr=calibration.rank_spread, fmt="o-", capsize=3)
    upper.set_ylabel("rank of raters x visual")
    upper.set_ylim(bottom=0)
    lower.plot(layers, calibration.mass, "o-")
    lower.set_ylim(0, 1)
    lower.axvline(calibration.exit_layer, color="grey", linestyle=":")
    lower.set_ylabel("attention of raters\non the image")
    lower.set_xlabel("decoder layer; dotted: visual tokens may leave after it")
    upper.set_title(f"{calibration.pairs} pairs")
    drawn = _drawn(figure, path, dpi=120)
    pyplot.close(figure)
    return drawn
