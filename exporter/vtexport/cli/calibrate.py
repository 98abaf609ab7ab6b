"""vtexport calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup

from vtexport.cli import options
from vtexport.cli.build import MODEL
from vtexport.errors import InputError
from vtexport.models.spec import ViewChoice
from vtexport.options import parse_options

_PATH = click.Path(path_type=Path)


@cloup.command("calibrate")
@cloup.option_group(
    "What to measure",
    MODEL,
    cloup.option("--data", required=True, type=_PATH, help="JSON lines of image (a path, or several) and prompt."),
    cloup.option("-o", "--out", required=True, type=_PATH, help="File to write, such as calibration.toml."),
    cloup.option("--plot", "plot_file", type=_PATH, help="Also draw the measurements into this file."),
    cloup.option(
        "--exit-tolerance",
        type=float,
        default=0.0,
        show_default=True,
        help="Share of the pairs whose next token may change when visual tokens leave early (method exit).",
    ),
)
@cloup.option_group(
    "For --keep auto",
    cloup.option("--method", "methods", multiple=True, help="Also try this method; may be repeated."),
    cloup.option("--buckets", metavar="LIST", help="Keep ratios to try it at.  [default: 0.5,0.33,0.25,0.17,0.125]"),
)
@cloup.option_group("Images per prompt, and tiles", *options.of_class(ViewChoice))
def calibrate(
    model: str,
    data: Path,
    out: Path,
    plot_file: Path | None,
    exit_tolerance: float,
    methods: tuple[str, ...],
    buckets: str | None,
    **values: Any,
) -> None:
    """Measure a model: the ranks that sparsevlm's schedules rest on, and the tables that --keep auto needs.

    \b
    vtexport calibrate --model micro-llava --data pairs.jsonl -o calibration.toml --plot ranks.png --method sparsevlm
    vtexport build --model micro-llava --keep 0.25 --calibration calibration.toml
    vtexport build --model micro-llava --keep auto --calibration calibration.toml

    If it is stopped, the same command goes on where it was. To start anew, delete the file .NAME.partial beside -o.
    """
    from vtexport.cli.console import stage_progress, stdout
    from vtexport.cli.report.calibration import calibration_table
    from vtexport.measure import calibrate as calibration
    from vtexport.measure.calibration.partial import partial_file
    from vtexport.measure.plots import calibration_plot, check_plot
    from vtexport.writing import Output, check_apart, check_file, write_all

    if buckets is not None and not methods:
        raise InputError("--buckets has no effect without --method; leave it out")
    trials = calibration.Trials.parse(methods, buckets, exit_tolerance)
    check_apart([("-o", out), ("--plot", plot_file)])
    check_file(out, "-o", [data])
    if plot_file is not None:
        check_plot(plot_file, [data])
    pairs, partial = calibration.read_pairs(data), partial_file(out)
    views = parse_options(ViewChoice, options.given(values, [ViewChoice]), "vtexport calibrate")
    with stage_progress() as progress:
        measured = calibration.calibrate_model(model, pairs, trials, progress, views, partial)
    outputs = [Output(out, measured.to_toml(), "-o")]
    if plot_file is not None:
        outputs.append(Output(plot_file, calibration_plot(measured, plot_file), "--plot"))
    write_all(outputs)
    if partial is not None:
        partial.unlink(missing_ok=True)
    stdout.print(calibration_table(measured))


COMMANDS = {"calibrate": calibrate}
