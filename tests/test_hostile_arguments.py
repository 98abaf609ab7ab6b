"""Every flag of every command with values that mean nothing: one line, exit code 2, and no work before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from vtexport.builder.options import BuildOptions
from vtexport.cli.main import COMMANDS, cli
from vtexport.errors import InputError, VtexportError
from vtexport.models.spec import ViewChoice

#: what a command needs besides the flag
REQUIRED: dict[str, list[str]] = {
    "build": ["--model", "micro-llava", "--out", "new"],
    "run": ["{bundle}", "--image", "{photo}", "--prompt", "what?"],
    "show": ["{bundle}", "--image", "{photo}", "--out", "kept.png"],
    "profile": ["{bundle}"],
    "eval": ["{bundle}"],
    "serve": ["{bundle}"],
    "deploy": ["{bundle}", "new", "--to", "triton"],
    "calibrate": ["--model", "micro-llava", "--data", "{pairs}", "--out", "new.toml"],
    "inspect": ["{bundle}"],
    "list": [],
    "doctor": [],
}
#: the flags that others have no effect without
BESIDE = {"--buckets": ["--method", "vispruner"], "--target-accuracy": ["--keep", "auto"]}
NOT_NUMBERS = ("nan", "inf", "-inf", "text", "1e", "½", "1,2", "true")
OUT_OF_RANGE = ("-1", "1000000000000")


def flags() -> Iterator[tuple[str, click.Option]]:
    """Every flag that takes a value, by its command."""
    with click.Context(cli) as context:
        for name in COMMANDS:
            command = cli.get_command(context, name)
            assert command is not None
            for parameter in command.params:
                if isinstance(parameter, click.Option) and not parameter.is_flag:
                    yield name, parameter


def is_number(option: click.Option) -> bool:
    return isinstance(option.type, click.types.IntParamType | click.types.FloatParamType) or option.metavar == "NUMBER"


FLAGS = {f"{command} {option.opts[0]}": (command, option) for command, option in flags()}
NUMBERS = {name: flag for name, flag in FLAGS.items() if is_number(flag[1])}


class Reached(VtexportError):
    """The work of a command would begin."""


@pytest.fixture
def arguments(
    monkeypatch: pytest.MonkeyPatch, micro_bundle: Path, photo: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """What each command needs; its work is not done."""

    def reached(*_: Any, **__: Any) -> None:
        raise Reached("the work would begin")

    for name in (
        "builder.build.assemble",
        "runtime.runner.Runner.open",
        "measure.profile.profile",
        "measure.sides.evaluate_sides",
        "measure.calibrate.calibrate_model",
        "deploy.roads.deploy",
    ):
        monkeypatch.setattr(f"vtexport.{name}", reached)
    pairs = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    pairs.write_text(f'{{"image": "{photo}", "prompt": "what?"}}\n')
    values = {"bundle": micro_bundle, "photo": photo, "pairs": pairs}
    return {command: [one.format(**values) for one in given] for command, given in REQUIRED.items()}


def test_there_are_flags_of_all_kinds() -> None:
    assert len(FLAGS) > 60
    assert len(NUMBERS) > 20


@pytest.mark.parametrize("name", FLAGS)
def test_blank_values_are_refused(name: str, vtexport: Any, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    command, option = FLAGS[name]
    for blank in ("", " "):
        for given in ([option.opts[-1], blank], [f"{option.opts[-1]}={blank}"]):
            refused(vtexport(command, *arguments[command], *given), tmp_path)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_bounds(name: str, vtexport: Any, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    command, option = NUMBERS[name]
    for value in (*NOT_NUMBERS, *OUT_OF_RANGE):
        given = [*arguments[command], *BESIDE.get(option.opts[0], []), option.opts[0], value]
        assert option.opts[0] in refused(vtexport(command, *given), tmp_path), value


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("build", ["--keep", "nan"]),
        ("build", ["--keep", "auto", "--buckets", "0.5,nan"]),
        ("build", ["--keep", "auto", "--target-accuracy", "nan"]),
        ("build", ["--method", "fastv", "--layers", "99999999999999999999"]),
        ("build", ["--grid", "2x2x2"]),
        ("calibrate", ["--method", "vispruner", "--buckets", "nan"]),
        ("calibrate", ["--method", "vispruner", "--buckets", "0.5,,0.2"]),
        ("eval", ["--limit", "1000000000000"]),
    ],
)
def test_lists_and_words(
    command: str, given: list[str], vtexport: Any, arguments: dict[str, list[str]], tmp_path: Path
) -> None:
    refused(vtexport(command, *arguments[command], *given), tmp_path)


def refused(outcome: Any, folder: Path) -> str:
    """The line with which a command was refused, before its work and with nothing written."""
    assert (outcome.code, outcome.out, list(folder.iterdir())) == (2, "", []), outcome
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert "the work would begin" not in outcome.err
    return str(outcome.err)


@pytest.mark.parametrize(
    "given",
    [
        {"keep": float("nan")},
        {"keep": True},
        {"keep": 0.5, "method": ""},
        {"keep": 0.5, "method": "  "},
        {"keep": 0.5, "target": ""},
        {"keep": 0.5, "dtype": ""},
        {"keep": "auto", "buckets": (0.5, float("nan"))},
        {"keep": "auto", "target_accuracy": float("nan")},
        {"keep": 0.5, "method": 5},
        {"keep": 0.5, "target": "tensorrt", "target_options": {"max_batch": 100_000_000}},
        {"keep": 0.5, "target": "tensorrt", "target_options": {"max_batch": True}},
        {"keep": 0.5, "method": "random", "method_options": {"seed": -1}},
        {"keep": 0.5, "method": "random", "method_options": {"seed": 1.5}},
        {"keep": 0.5, "method": "sparsevlm", "method_options": {"layers": " "}},
    ],
)
def test_what_python_gives_as_options(given: dict[str, Any]) -> None:
    def choose() -> None:
        options = BuildOptions("micro-llava", **given)
        _ = options.methods, options.chosen_target

    with pytest.raises(InputError) as refusal:
        choose()
    assert len(str(refusal.value).splitlines()) == 1


def test_views_have_bounds() -> None:
    from vtexport.options import parse_options

    for images in (0, -1, 10**9, True, float("nan"), "", "two"):
        with pytest.raises(InputError):
            parse_options(ViewChoice, {"images": images}, "vtexport build")
