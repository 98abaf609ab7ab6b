"""The command `vtexport`: a group whose commands are imported when they are used."""

from __future__ import annotations

import sys
from importlib import import_module

import click
import cloup

from vtexport.errors import VtexportError

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
    """Run the command line; errors meant for the user become one line and exit code 2."""
    try:
        cli.main(standalone_mode=False)
    except VtexportError as error:
        _refuse(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _refuse(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped; nothing was written", err=True)
        sys.exit(130)


def _refuse(message: str) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)
