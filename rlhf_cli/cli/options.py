"""Options that several commands share, and the two ways to say something."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

from rlhf_cli.cli import complete
from rlhf_cli.cli.help import RUN, SHOWN
from rlhf_cli.cli.tools import silence_stdout
from rlhf_cli.errors import RecipeError

BROKEN_PIPE = 141

RecipeFile = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML recipe.", show_default=False, autocompletion=complete.recipes)
]
Bare = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Overrides, the same as --set.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a value. Repeatable.")
]
OutputDir = Annotated[str | None, typer.Option("--output-dir", "-o", metavar="DIR", help="The run directory.")]
_RESUME = typer.Option(
    "--resume", metavar="auto|never|PATH", help="What to do with an earlier run.", rich_help_panel=RUN,
    autocompletion=complete.one("auto", "never"),
)  # fmt: skip
_RESUME_ROWS = typer.Option(
    "--resume", metavar="auto|never", help="What to do with an earlier run.", rich_help_panel=RUN,
    autocompletion=complete.one("auto", "never"),
)  # fmt: skip
Resume = Annotated[str, _RESUME]
ResumeRows = Annotated[str, _RESUME_ROWS]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, make nothing.", rich_help_panel=RUN)]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="Stop after so many steps.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Decides data order, initial weights and sampling.")]
_REPORT_TO = typer.Option(
    "--report-to", metavar="NAME", help="A tracker. Repeatable.", rich_help_panel=SHOWN,
    autocompletion=complete.one("tensorboard", "wandb", "trackio"),
)  # fmt: skip
ReportTo = Annotated[list[str] | None, _REPORT_TO]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and errors only.", rich_help_panel=SHOWN)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every step.", rich_help_panel=SHOWN)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=SHOWN)]


def say(text: str) -> None:
    """A line on stderr, whatever becomes of it."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """Data on stdout; ends the program quietly when nobody reads it."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
        raise typer.Exit(BROKEN_PIPE) from None


def one_of(option: str, given: str, known: tuple[str, ...]) -> None:
    """Raises RecipeError when an option has none of the known values."""
    if given not in known:
        raise RecipeError(f"'{given}' is not one of {', '.join(known)}", option)
