"""The command `vtexport`: a group whose commands are imported when they are used."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click
import cloup

from vtexport.cli.streams import checked, quieted, say
from vtexport.errors import InputError, VtexportError
from vtexport.stopping import Stopped, Stopping, ignore
from vtexport.writing import journal

#: command -> its module, and its line in the list of commands
COMMANDS = {
    "build": ("vtexport.cli.build", "Build a bundle: a folder of engine files to deploy."),
    "run": ("vtexport.cli.ask", "Answer questions about images."),
    "show": ("vtexport.cli.ask", "Draw which parts of an image a bundle keeps."),
    "profile": ("vtexport.cli.measure", "Measure latency by stage, alone or alternating with another bundle."),
    "eval": ("vtexport.cli.evaluate", "Score a bundle's answers to questions, beside those of other bundles."),
    "serve": ("vtexport.cli.serve", "Serve a bundle to clients of OpenAI's API."),
    "deploy": ("vtexport.cli.deploy", "Write a bundle as another server or runtime loads it."),
    "calibrate": ("vtexport.cli.calibrate", "Measure a model: what schedules and --keep auto rest on."),
    "inspect": ("vtexport.cli.about", "Describe a bundle, and check that its files are unchanged."),
    "list": ("vtexport.cli.about", "List models, methods and targets."),
    "doctor": ("vtexport.cli.about", "Say which targets work on this machine, and what is missing for the others."),
}


class _Lazy(cloup.Group):
    """A group that imports a command's module only when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command: click.Command = import_module(module).COMMANDS[cmd_name]
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@cloup.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
)
@click.version_option(package_name="vtexport")
def cli() -> None:
    """Compile LLaVA into inference engines with visual-token pruning inside.

    \b
    vtexport build --model micro-llava --keep 0.25 --out micro
    vtexport run micro --image photo.png --prompt "what digit is red?"
    """


def main() -> None:
    """Run the command line; errors meant for the user become one line and exit code 2, signals one and 128 + number."""
    journal.clear()
    with Stopping() as stopping:
        try:
            code = _run(stopping)
            stopping.end()
        except (Stopped, KeyboardInterrupt, click.Abort) as stop:
            stopping.end()
            _say(_stopped())
            code = getattr(stop, "exit_code", 130)
    # Whatever is to stop the process now finds its work done; only Python itself is still to end.
    atexit.unregister(ignore)
    atexit.register(ignore)
    if code:
        sys.exit(code)


def _run(stopping: Stopping) -> int:
    """Run the command line and report errors; the exit code."""
    try:
        with checked(), quieted():
            _check_blank(sys.argv[1:])
            cli.main(standalone_mode=False)
    except VtexportError as error:
        return _refuse(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        return _refuse(error.format_message())
    except Exception as error:
        if stopping.number:
            raise Stopped(stopping.number) from error
        if not isinstance(error, OSError) or error.errno is None:
            raise
        return _refuse(_of_system(error))
    return 0


def _check_blank(arguments: Sequence[str]) -> None:
    """Refuse a blank value, which comes from a variable of the shell that is not set, and would mean the default."""
    flag = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        blank = flag or "an argument" if not argument.strip() else ""
        if name.startswith("--") and equals and not value.strip():
            blank = name
        if blank == "--prompt":
            raise InputError("the prompt is empty; ask something about the image")
        if blank:
            raise InputError(f"{blank} is blank; give a value, or leave it out")
        if "\0" in argument:
            raise InputError(f"{flag or 'an argument'} has the character NUL in it; leave it out")
        flag = argument if argument.startswith("-") else ""


def _refuse(message: str) -> int:
    _say(f"error: {' '.join(message.split())}")
    return 2


def _say(line: str) -> None:
    # The terminal may be gone, which is why the process was stopped.
    with contextlib.suppress(OSError):
        say(line, err=True)


def _of_system(error: OSError) -> str:
    """One line about an error of the system that nothing has handled, such as an odd path."""
    where = "the system" if error.filename is None else os.fsdecode(error.filename)
    return f"{where}: {error.strerror}; see whether the path and its permissions are right"


def _stopped() -> str:
    """What a stopped process says, which only mentions writing if it was to write."""
    if journal.written:
        return f"stopped; {', '.join(map(str, journal.written))} had been written"
    return "stopped; nothing was written" if journal.planned else "stopped"
