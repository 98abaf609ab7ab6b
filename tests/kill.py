"""Stops commands that write at random moments, and checks that the old or the new result is there, whole.

    python -m tests.kill --moments 100 --seed 0

A moment is an event of the file system, drawn from all of an undisturbed run: the process sends itself the signal just
before it. Half of the moments lie among the last events, where results are put in place. Commands are forked from a
process that has imported everything, so that all moments are those of the work. It ends with a summary as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vtexport.bundle.folder import Bundle
from vtexport.bundle.writing import check_destination
from vtexport.errors import InputError, VtexportError
from vtexport.pruning.calibration import Calibration
from vtexport.writing import write_whole

SIGNALS = {"KILL": [signal.SIGKILL], "INT": [signal.SIGINT], "TERM": [signal.SIGTERM], "HUP": [signal.SIGHUP],
           "INT-INT": [signal.SIGINT, signal.SIGINT]}  # fmt: skip
#: audit events of Python before which a process can be stopped
_EVENTS = ("open", "os.", "shutil.", "tempfile.", "fcntl.", "ctypes.dlsym")
_LAST = 30
#: what a calibration that was stopped leaves on purpose: the next one goes on from there
_RESUMED = ".ranks.toml.partial"


@dataclass(frozen=True)
class Command:
    """A command and its result.

    Attributes:
        arguments: the command line, run in a folder of its own.
        out: the file or folder that it writes there.
        prepare: puts what the command finds into the folder.
        state: what is there afterwards: "old", "new", or what is wrong.
    """

    arguments: list[str]
    out: str
    prepare: Callable[[Path], None]
    state: Callable[[Path], str]


@dataclass
class Tally:
    """What came of the moments of one command and one signal."""

    states: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    leftovers: int = 0
    wrong: list[str] = field(default_factory=list)


def commands(place: Path, model: str | None, keep: tuple[str, str] = ("0.4", "0.8")) -> dict[str, Command]:
    """The commands that write, on `model` or a small random one that is made in `place`."""
    from tests.checkpoints import random_checkpoint
    from vtexport.micro.pairs import write_pairs

    model = model or str(random_checkpoint(place / "model", seed=0))
    pairs = place / "pairs"
    pairs.mkdir()
    data = str(write_pairs(pairs, 2))
    built = place / "built"
    old = ["build", "--model", model, "--method", "fastervlm", "--keep", keep[0], "--out"]
    assert run([*old, str(built)], place).code == 0

    def bundle(path: Path, absent: str) -> str:
        if not path.exists():
            return absent
        try:
            opened = Bundle.open(path)
            opened.verify(lambda _bytes: None)
        except VtexportError as error:
            return str(error)
        return "old" if f"{opened.manifest.plans[0].keep:g}" == keep[0] else "new"

    def ranks(path: Path) -> str:
        if path.read_text() == "old":
            return "old"
        try:
            Calibration.load(path)
        except VtexportError as error:
            return str(error)
        return "new"

    def deployed(path: Path) -> str:
        if not path.exists():
            return "old"
        names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        return "new" if names == whole else f"half: {names}"

    reference = place / "reference"
    assert run(["deploy", str(built), "--to", "triton", str(reference)], place).code == 0
    whole = sorted(str(file.relative_to(reference)) for file in reference.rglob("*") if file.is_file())
    new = ["build", "--model", model, "--method", "fastervlm", "--keep", keep[1], "--out", "out"]
    return {
        "build": Command(new, "out", lambda _place: None, lambda path: bundle(path, "old")),
        "force": Command(
            [*new, "--force"], "out", lambda place: shutil.copytree(built, place / "out"), lambda path: bundle(path, "lost")
        ),
        "calibrate": Command(
            ["calibrate", "--model", model, "--data", data, "-o", "ranks.toml", "--plot", "ranks.png"],
            "ranks.toml",
            lambda place: (place / "ranks.toml").write_text("old") and None,
            ranks,
        ),
        "deploy": Command(["deploy", str(built), "--to", "triton", "out"], "out", lambda _place: None, deployed),
    }  # fmt: skip


@dataclass(frozen=True)
class Run:
    code: int
    events: int
    said: str


def run(arguments: list[str], place: Path, signals: list[int] = [], moments: list[int] = []) -> Run:  # noqa: B006
    """Run the command in a fork of this process; each of `signals` comes before the event of that number."""
    reader, writer = os.pipe()
    said = place.with_name(f"{place.name}.said")
    child = os.fork()
    if child == 0:
        os.close(reader)
        _be_the_command(arguments, place, said, writer, dict(zip(moments, signals, strict=True)))
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        counted = pipe.read()
    _, ended = os.waitpid(child, 0)
    text = said.read_text(errors="replace")
    said.unlink()
    return Run(os.waitstatus_to_exitcode(ended), int(counted or 0), text)


def _be_the_command(arguments: list[str], place: Path, said: Path, writer: int, when: dict[int, int]) -> None:
    from vtexport.cli import main as cli

    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(place)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # In the background of a shell or under nohup, this process ignores them.
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = ["vtexport", *arguments]
    events, code, counting = 0, 0, True

    def hook(event: str, _arguments: object) -> None:
        nonlocal events
        if counting and event.startswith(_EVENTS):
            events += 1
            if events in when:
                os.kill(os.getpid(), when[events])

    sys.addaudithook(hook)
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:  # noqa: BLE001 - as Python itself would
        traceback.print_exc()
        code = 1
    counting = False
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(writer, str(events).encode())
    os._exit(code)


def try_moments(command: Command, name: str, count: int, draw: random.Random, scratch: Path) -> Tally:
    """Stop `command` by the signals `name` at `count` moments."""
    tally = Tally()
    events = _undisturbed(command, scratch)
    for number in range(count):
        place = scratch / f"{number}"
        place.mkdir()
        command.prepare(place)
        first = draw.randint(1, events) if number % 2 else draw.randint(max(1, events - _LAST), events)
        moments = [first, first + draw.randint(1, 8)][: len(SIGNALS[name])]
        done = run(command.arguments, place, [int(one) for one in SIGNALS[name]], moments)
        state = command.state(place / command.out)
        tally.states[state] += 1
        tally.codes[done.code] += 1
        left = _others(command, place) - {_RESUMED}
        tally.leftovers += bool(left)
        for complaint in _complaints(command, name, done, state, left, place):
            tally.wrong.append(f"{name} before event {moments} of {events}: {complaint}")
        shutil.rmtree(place)
    return tally


def _undisturbed(command: Command, scratch: Path) -> int:
    place = scratch / "undisturbed"
    place.mkdir()
    command.prepare(place)
    done = run(command.arguments, place)
    assert (done.code, command.state(place / command.out)) == (0, "new"), done.said
    assert not _others(command, place)
    shutil.rmtree(place)
    return done.events


def _others(command: Command, place: Path) -> set[str]:
    """What lies in `place` besides results."""
    return {path.name for path in place.iterdir()} - {command.out, "ranks.png"}


def _complaints(command: Command, name: str, done: Run, state: str, left: set[str], place: Path) -> list[str]:
    """What is wrong about how a stopped process left things."""
    found = [] if state in ("old", "new") else [state]
    if name != "KILL":
        expected = 128 + SIGNALS[name][0]
        last = (done.said.splitlines() or [""])[-1]
        if done.code not in (0, expected):
            found.append(f"exit code {done.code}: {done.said[-500:]}")
        if "Traceback" in done.said:
            found.append(done.said[-1500:])
        if left and name != "INT-INT":
            found.append(f"left {left}")
        # Before its checks, a command does not know yet that it will write.
        said = {"stopped; nothing was written": "old", "stopped": "old"}.get(last, "new")
        if done.code == expected and said != state:
            found.append(f"{state}, but said {last!r}")
    # What the next command to this place does before its work.
    if command.out == "out":
        with contextlib.suppress(InputError):
            check_destination(place / command.out, force=True)
    else:
        write_whole(place / "ranks.png", "")
    still = _others(command, place) - {_RESUMED}
    return [*found, f"not swept: {still}"] if still else found


def main() -> None:
    """Try all commands and signals, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=10, help="moments per command and signal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", default=",".join(SIGNALS))
    parser.add_argument("--commands", default="build,force,calibrate,deploy")
    parser.add_argument("--model", help="as for `vtexport build`; by default a small random one")
    given = parser.parse_args()
    warm_up()
    began, results = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        every = commands(place, given.model)
        for number, (command, name) in enumerate(
            (command, name) for command in given.commands.split(",") for name in given.signals.split(",")
        ):
            scratch = place / f"scratch-{number}"
            scratch.mkdir()
            tally = try_moments(
                every[command], name, given.moments, random.Random(f"{given.seed} {command} {name}"), scratch
            )
            results[f"{command} {name}"] = {**vars(tally), "moments": given.moments}
            print(command, name, results[f"{command} {name}"], file=sys.stderr, flush=True)  # noqa: T201
    wrong = sum(len(tally["wrong"]) for tally in results.values())
    summary = {
        "seed": given.seed,
        "model": given.model,
        "wrong": wrong,
        "seconds": round(time.monotonic() - began),
        "results": results,
    }
    print(json.dumps(summary))  # noqa: T201
    sys.exit(1 if wrong else 0)


def warm_up() -> None:
    """Import what commands import, but start no thread, which forks would lack."""
    import matplotlib.pyplot
    import onnxruntime  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    matplotlib.use("Agg")


if __name__ == "__main__":
    main()
