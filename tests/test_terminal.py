"""What terminals, pipes and files get: reports whole at any width, figures rounded alike, nothing that acts on a terminal."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Group

from tests.checkpoints import MICRO
from tests.test_pages import report
from vtexport import figures
from vtexport.builder.build import dry_run
from vtexport.builder.options import BuildOptions
from vtexport.bundle.folder import Bundle
from vtexport.cli.console import _Output
from vtexport.cli.report import answers, bundle, calibration, catalogue, evaluation, profile
from vtexport.cli.report.layout import Facts, Paragraph, Table, Whole
from vtexport.cli.streams import quieted
from vtexport.errors import printable
from vtexport.measure.evaluate import Reply, Score
from vtexport.measure.questions import Item
from vtexport.measure.scoring import METRICS
from vtexport.measure.sides import Results, Settings, Side
from vtexport.measure.significance import Comparison
from vtexport.pruning.adaptive import AdaptiveTable
from vtexport.pruning.calibration import Calibration

WIDTHS = (40, 60, 80, 120, 200)
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Screen(io.StringIO):
    """A file that may be a terminal."""

    def __init__(self, width: int | None) -> None:
        super().__init__()
        self.width = width

    def isatty(self) -> bool:
        return self.width is not None


def seen(renderable: Any, width: int | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal of `width` columns gets, or with None what a pipe gets."""
    monkeypatch.setenv("COLUMNS", str(width or 80))
    console = _Output(stderr=False)
    console.file = Screen(width)
    console.print(renderable)
    text: str = console.file.getvalue()
    return ESCAPES.sub("", text)


def parts(renderable: Any) -> Iterator[Any]:
    if isinstance(renderable, Group):
        for inner in renderable.renderables:
            yield from parts(inner)
    else:
        yield renderable


def check_whole(renderable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every width all words are there, none is broken, and lines are as long as the terminal is wide at most."""
    words: Counter[str] = Counter()
    lines: list[str] = []
    for part in parts(renderable):
        if isinstance(part, Table):
            words += Counter(word for row in part._rows[1:] for cell in row for word in cell.split())
            lines += [cell for row in part._rows for cell in row]
        elif isinstance(part, Facts):
            words += Counter(word for row in part._rows for cell in row for word in cell.split())
            lines += [f"{name}  {value}" for name, value in part._rows]
        else:
            assert isinstance(part, Paragraph) or part == ""
            lines += [] if part == "" else part._lines
    for width in (*WIDTHS, None):
        text = seen(renderable, width, monkeypatch)
        assert "\u2026" not in text
        missing = words - Counter(text.replace(":\n", "\n").split()) - Counter(text.split())
        assert not missing, (width, missing)
        for line in text.splitlines():
            assert line == line.rstrip()
            if width is not None and len(line) > width:
                # A word that is longer than the terminal is wide, or what is to be copied.
                assert len(line.split()) == 1 or "vtexport run" in line or "/" in line, (width, line)
    whole = seen(renderable, None, monkeypatch)
    for part in parts(renderable):
        if isinstance(part, Facts | Paragraph):
            for line in part.lines(10**6):
                assert line.plain in whole
    # Wider is no wider than it needs: off a terminal, and on one that is wide enough, it is the same.
    assert seen(renderable, 1000, monkeypatch) == whole


def score(right: int, total: int, keeps: tuple[float, ...] = (0.25,)) -> Score:
    kinds = ("digit", "a kind of question that has a long name", "count")
    item = [Item(n, "?", ("1",), kind=kinds[n % 3]) for n in range(total)]
    return Score(
        tuple(
            Reply(item[n], "1", float(n < right), keeps[n % len(keeps)], 35.9999999, 0.0004, 1234.5678, False)
            for n in range(total)
        ),
        keeps,
    )


def evaluations() -> Iterator[Any]:
    settings = Settings(METRICS["exact"], 1, 16)
    this = Side("micro", "sparsevlm", score(1998, 1999))
    comparison = Comparison(-0.0004, -0.123, 0.004, 1234, 5, 1e-9, "exact McNemar test")
    other = [
        Side(name, "fastervlm+sparsevlm", score(1500, 1999), comparison)
        for name in ("dense", "a/long/path/to/a/bundle-of-micro-llava")
    ]
    yield evaluation.evaluation_table(Results((this,), settings, "A processor [/x] :smile:"))
    yield evaluation.evaluation_table(Results((this, *other), settings, "A processor"))
    yield evaluation.evaluation_table(Results((Side("a", "auto", score(3, 9, (0.5, 0.125))),), settings, "A processor"))


def calibrated() -> Any:
    table = AdaptiveTable("fastervlm", (0.5, 0.125), (8.123456, 30.0, 90.0), ((1.0, 0.9996, 0.5), (0.0, 0.0004, 0.3)))
    return calibration.calibration_table(
        Calibration(
            "f", 144, 1200, (9.0, 12.25), (0.0, 1.0), (0.9999, 0.1), (0.5,), ((1, 2, 3),), (1.0,), 1, 0.0, (table,)
        )
    )


def runs() -> Any:
    tokens, times = {"mean": 35.9999999, "total": 2880}, {"preprocess": 1.0, "vision": 0.0004, "prefill": 12345.6}
    said = [
        SimpleNamespace(keep=keep, spread=12.3456, visual_tokens=tokens, timings_ms={**times, "per_token": 0.81})
        for keep in (0.5, 0.125)
    ]
    return answers.run_summary(said)  # type: ignore[arg-type]


def test_every_report_is_whole_at_any_width(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(micro_bundle)
    profiled = report(layers={"vision": {"a_layer/of/the/runtime with a name": 0.0004, "b": 2.0}})
    profiled.this.bundle, profiled.against.bundle = "a/long/path/to/a/bundle", "another/long/path"  # type: ignore[union-attr]
    for renderable in (
        catalogue.catalogue_tables(),
        catalogue.health_tables(),
        bundle.build_summary(opened),
        bundle.bundle_table(opened, verified=True),
        bundle.dry_run_summary(dry_run(BuildOptions(str(MICRO), 0.25))),
        profile.profile_table(profiled),
        profile.profile_table(report(against=None)),
        profile.layer_table(profiled, 3),
        calibrated(),
        runs(),
        *evaluations(),
    ):
        check_whole(renderable, monkeypatch)


def test_the_command_to_try_next_names_files_that_are_there(micro_bundle: Path) -> None:
    opened = Bundle.open(micro_bundle)
    # As it is called when it is built by its name.
    model = msgspec.structs.replace(opened.manifest.model, name="micro-llava")
    named = replace(opened, manifest=msgspec.structs.replace(opened.manifest, model=model))
    words = shlex.split(bundle._next(named))
    assert words[:3] == ["vtexport", "run", str(micro_bundle)]
    assert Path(words[words.index("--image") + 1]).is_file()


def test_what_is_to_be_copied_stays_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "vtexport run a bundle --image FILE --prompt 'what is in the image?'"
    assert command in seen(Facts([("next", Whole(command))]), 40, monkeypatch)
    assert command not in seen(Facts([("next", command)]), 40, monkeypatch)


@given(st.lists(st.lists(st.text(max_size=12), min_size=3, max_size=3), max_size=3), st.integers(1, 100))
def test_tables_of_any_text_are_whole(rows: list[list[str]], width: int) -> None:
    table = Table("a", "b c", "d")
    for row in rows:
        table.add_row(*row)
    text = "\n".join(line.plain for line in table.lines(width))
    cells = "".join(printable(cell) for row in rows for cell in row).replace(" ", "")
    assert not Counter(cells) - Counter(text)


# Figures


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (figures.number(1.9999999), "2"),
        (figures.number(144), "144"),
        (figures.number(2879.6), "2,880"),
        (figures.number(1.2e9), "1,200,000,000"),
        (figures.number(math.nan), "n/a"),
        (figures.milliseconds(0.0042), "0.0042"),
        (figures.milliseconds(1.999999), "2.00"),
        (figures.milliseconds(99.999), "100.0"),
        (figures.milliseconds(12345.6), "12,346"),
        (figures.times(2.0, "\u00d7"), "2.00\u00d7"),
        (figures.percent(1.0), "100.0%"),
        (figures.percent(0.9996), ">99.9%"),
        (figures.percent(0.0004), "<0.1%"),
        (figures.percent(0.999, 0), ">99%"),
        (figures.points(-0.0004), "0.0"),
        (figures.points(0.0123), "+1.2"),
        (figures.probability(1e-9), "<0.0001"),
        (figures.size(999), "999 B"),
        (figures.size(999_960_000), "1.00 GB"),
        (figures.size(14_400_648), "14.4 MB"),
        (figures.seconds(0.01), "<0.1 s"),
        (figures.seconds(99.96), "2 min"),
    ],
)
def test_figures_are_rounded_to_what_a_reader_uses(written: str, wanted: str) -> None:
    assert written == wanted


@given(st.floats(min_value=1e-9, max_value=1e15, allow_nan=False))
def test_no_figure_reads_as_none_or_has_an_exponent(value: float) -> None:
    for text in (figures.number(value), figures.milliseconds(value), figures.times(value)):
        assert "e" not in text
        assert float(text.replace(",", "").removesuffix("x")) == pytest.approx(value, rel=0.06)
    assert re.fullmatch(r"[\d,.]{1,9} [kMGT]?B", figures.size(int(value)))


def test_json_has_no_figures_that_are_none() -> None:
    given = {"a": [math.nan, 1.5, {"b": -math.inf}], "c": (1, "\x1b")}
    assert json.loads(figures.to_json(given)) == {"a": [None, 1.5, {"b": None}], "c": [1, "\x1b"]}


# What a terminal would act upon


HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\rover\x08\u202egnp\udcff"


def test_text_from_outside_cannot_act_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = seen(Group(Facts([(HOSTILE, HOSTILE)]), Paragraph(HOSTILE), HOSTILE), None, monkeypatch)
    table = Table(HOSTILE, "b")
    table.add_row(HOSTILE, HOSTILE)
    for text in (shown, seen(table, 40, monkeypatch), printable(HOSTILE, keep="\n\t")):
        assert text.isascii()
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
        assert "\\x1b]0;title" in text
    assert printable("Gr\u00fc\u00dfe, \u4e2d\u6587 \u0645\u0631\u062d\u0628\u0627\n", keep="\n").endswith("\u0627\n")


def test_names_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(Group("a [bold]b[/] :smile: [/nothing]"), None, monkeypatch) == "a [bold]b[/] :smile: [/nothing]\n"


def test_libraries_quote_nothing_that_acts_on_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    with quieted():
        logging.getLogger("some.library").error("the key %s", "\x1b[31mred")
        logging.getLogger("PIL.TiffImagePlugin").error("More samples per pixel than can be decoded")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("the key \x1b]0;title\x07", stacklevel=1)
    assert logging.getLogRecordFactory() is before
    assert logging.getLogger("PIL").level == logging.NOTSET
    logged, warned = caplog.messages
    assert logged == r"the key \x1b[31mred"
    assert r"UserWarning: the key \x1b]0;title\x07" in warned
    assert "\x1b" not in warned


def test_transformers_adds_no_lines_to_an_error(tmp_path: Path) -> None:
    """In a process of its own, because transformers reads its level once."""
    config = json.loads((MICRO / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "of\x1b[31mred", "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "vtexport", "build", "--model", str(tmp_path), "--keep", "0.25", "--dry-run"]
    for level, lines in (("", 1), ("warning", 2)):
        environment = {**os.environ, **({"TRANSFORMERS_VERBOSITY": level} if level else {})}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 2
        assert r"RoPE of type 'of\x1b[31mred'" in done.stderr.splitlines()[-1]
        assert len(done.stderr.splitlines()) == lines, done.stderr
        assert "\x1b" not in done.stderr


def test_an_error_cannot_act_on_a_terminal(vtexport) -> None:
    outcome = vtexport("inspect", "no\x1b[31mbundle")
    assert outcome.code == 2
    assert "\x1b" not in outcome.err
    assert "no\\x1b[31mbundle" in outcome.err


# Streams


def command(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vtexport", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


@pytest.mark.parametrize("arguments", [["--help"], pytest.param(["list", "--json"], marks=pytest.mark.long)])
def test_a_full_disk_behind_stdout_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = command(arguments, stdout=full)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "standard output: No space left on device" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], pytest.param(["list"], marks=pytest.mark.long)])
def test_a_reader_that_leaves_is_no_error_to_report(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = command(arguments, stdout=writing)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


def test_a_closed_stdout_is_no_one_elses_file(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.close(1); sys.stdout = None\n"
        "from vtexport.cli.streams import checked, say\n"
        "with checked(): file = open('f', 'w'); say('x'); print(file.fileno() > 2, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr == "True\n"


def test_an_ascii_terminal_gets_escapes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "TERM": "dumb", "FORCE_COLOR": "1"}
    code = (
        "from vtexport.cli.streams import checked, say\n"
        "from vtexport.cli.console import stdout\n"
        "with checked(): stdout.print('caf\\u00e9 \\u4e2d'); stdout.print('x', style='bold'); say('\\ud800')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert "caf\\xe9 \\u4e2d\n" in done.stdout
    assert "\\ud800" in done.stdout
    environment |= {"FORCE_COLOR": "", "NO_COLOR": "1"}
    plain = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert plain.stdout == ESCAPES.sub("", done.stdout)


def test_a_full_stderr_stops_no_work() -> None:
    code = (
        "from vtexport.cli.streams import checked, say\n"
        "with checked(): say('progress', err=True); say('more', err=True); say('result')"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, text=True, check=True)
    assert done.stdout == "result\n"


def test_a_narrow_terminal_gets_lines_that_fit() -> None:
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-m", "vtexport", "list"], stdin=slave, stdout=slave, env={**environment, "TERM": "dumb"}
    ) as child:
        os.close(slave)
        read = b""
        try:
            while piece := os.read(master, 65536):
                read += piece
        except OSError:
            # So a pseudo-terminal ends.
            pass
        assert child.wait() == 0
    os.close(master)
    lines = ESCAPES.sub("", read.decode()).splitlines()
    assert len(lines) > 40
    assert max(map(len, lines)) <= 60
