"""Options that several commands share, and the two ways to say something."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

from rlhf_cli.cli.tools import silence_stdout
from rlhf_cli.errors import RecipeError

BROKEN_PIPE = 141

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML recipe.", show_default=False)]
Bare = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Overrides, the same as --set.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a value. Repeatable.")
]
OutputDir = Annotated[str | None, typer.Option("--output-dir", "-o", metavar="DIR", help="The run directory.")]
Resume = Annotated[str, typer.Option(metavar="auto|never|PATH", help="What to do with an earlier run.")]
ResumeRows = Annotated[str, typer.Option("--resume", metavar="auto|never", help="What to do with an earlier run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, make nothing.")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="Stop after so many steps.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Decides data order, initial weights and sampling.")]
ReportTo = Annotated[list[str] | None, typer.Option("--report-to", metavar="NAME", help="A tracker. Repeatable.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every step.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


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
