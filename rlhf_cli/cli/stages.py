"""The commands that work from a recipe, one for each stage of the catalogue. Its code is imported when it runs."""

from __future__ import annotations

import shlex
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_cli.catalog import STAGES
from rlhf_cli.cli import tools
from rlhf_cli.cli.options import (
    Bare,
    Debug,
    DryRun,
    MaxSteps,
    OutputDir,
    Quiet,
    RecipeFile,
    ReportTo,
    Resume,
    ResumeRows,
    Seed,
    Sets,
    Verbose,
    emit,
)
from rlhf_cli.errors import RecipeError, RlhfError
from rlhf_cli.runs.options import Options

if TYPE_CHECKING:
    from rlhf_cli.runs.directory import Run
    from rlhf_cli.runs.place import Place


def add_stages(app: typer.Typer) -> None:
    """Add them all, in the order of the catalogue."""
    own: dict[str, Any] = {"sample": _sample, "eval": _eval}
    for stage in STAGES.values():
        make = _training if stage.trains else _data
        command = own[stage.name] if stage.name in own else make(stage.name)
        app.command(stage.name, help=f"{stage.help}.", no_args_is_help=False)(command)


def _training(name: str) -> Any:
    """The command that trains with that stage's code."""

    def command(
        context: typer.Context,
        recipe: RecipeFile,
        bare: Bare = None,
        sets: Sets = None,
        output_dir: OutputDir = None,
        resume: Resume = "auto",
        dry_run: DryRun = False,
        max_steps: MaxSteps = None,
        seed: Seed = None,
        report_to: ReportTo = None,
        quiet: Quiet = False,
        verbose: Verbose = False,
        debug: Debug = False,
    ) -> None:
        overrides = [*(bare or []), *(sets or []), *_shorthands(output_dir, max_steps, seed, report_to)]
        _train(name, recipe, overrides, Options(resume, dry_run, debug), quiet, verbose, line_of(context))

    return command


def _data(name: str) -> Any:
    """The command that makes data with that stage's code."""

    def command(
        context: typer.Context,
        recipe: RecipeFile,
        bare: Bare = None,
        sets: Sets = None,
        output_dir: OutputDir = None,
        resume: ResumeRows = "auto",
        dry_run: DryRun = False,
        seed: Seed = None,
        quiet: Quiet = False,
        verbose: Verbose = False,
        debug: Debug = False,
    ) -> None:
        overrides = [*(bare or []), *(sets or []), *_shorthands(output_dir, None, seed, None)]
        _train(name, recipe, overrides, Options(resume, dry_run, debug), quiet, verbose, line_of(context))

    return command


def _sample(
    context: typer.Context,
    recipe: RecipeFile,
    bare: Bare = None,
    sets: Sets = None,
    output_dir: OutputDir = None,
    best_of: Annotated[int | None, typer.Option("--best-of", help="Keep the best of so many completions.")] = None,
    resume: ResumeRows = "auto",
    dry_run: DryRun = False,
    seed: Seed = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    more = [f"best_of={best_of}"] if best_of is not None else []
    overrides = [*(bare or []), *(sets or []), *_shorthands(output_dir, None, seed, None), *more]
    _train("sample", recipe, overrides, Options(resume, dry_run, debug), quiet, verbose, line_of(context))


def _eval(
    context: typer.Context,
    recipe: RecipeFile,
    bare: Bare = None,
    sets: Sets = None,
    output_dir: OutputDir = None,
    against: Annotated[
        list[str] | None, typer.Option("--against", metavar="RUN", help="Compare with this model. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
    resume: ResumeRows = "auto",
    dry_run: DryRun = False,
    seed: Seed = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    from rlhf_cli.recipe.reader import quote
    from rlhf_cli.runs.place import place

    if as_json and dry_run:
        raise RecipeError("--json and --dry-run exclude each other: a dry run has no figures", "command line")
    more = [f"against=[{', '.join(map(quote, against))}]"] if against else []
    overrides = [*(bare or []), *(sets or []), *_shorthands(output_dir, None, seed, None), *more]
    path = _train("eval", recipe, overrides, Options(resume, dry_run, debug), quiet, verbose, line_of(context))
    if as_json and place().first:
        emit(tools.figures(path))


def _shorthands(
    output_dir: str | None, max_steps: int | None, seed: int | None, report_to: list[str] | None
) -> list[str]:
    """Options that are overrides of the recipe under a shorter name."""
    from rlhf_cli.recipe.reader import quote

    return [
        *([f"output_dir={quote(output_dir)}"] if output_dir is not None else []),
        *([f"training.max_steps={max_steps}"] if max_steps is not None else []),
        *([f"seed={seed}"] if seed is not None else []),
        *([f"logging.report_to=[{', '.join(map(quote, report_to))}]"] if report_to else []),
    ]


def _train(
    stage: str, path: str, overrides: list[str], options: Options, quiet: bool, verbose: bool, line: str
) -> Path:
    """Read the recipe, open the run directory, hand over to the stage. Returns the run directory."""
    from rlhf_cli.cli.view import make_display
    from rlhf_cli.recipe.inherit import inherit_adapter
    from rlhf_cli.recipe.reader import read_recipe
    from rlhf_cli.rollouts.server import check_keys
    from rlhf_cli.runs.decide import up_to_date
    from rlhf_cli.runs.follower import Mute
    from rlhf_cli.runs.place import place

    if quiet and verbose:
        raise RecipeError("--quiet and --verbose exclude each other", "command line")
    recipe = inherit_adapter(read_recipe(path, overrides, stage))
    here = place()
    display = make_display(quiet, verbose, stage) if here.first else Mute()
    run = _open(recipe, line, options, here)
    try:
        if run.status == "done":
            display.note(f"{run.path}: {up_to_date(run.path, recipe.max_steps)}")
            return run.path
        check_keys(recipe)
        train = STAGES[stage].load()
        tools.watch_garbage()
        train(recipe, run, display, options)
        if _meets(recipe, here):
            from rlhf_cli.stages.company import leave

            leave()
        return run.path
    except RlhfError:
        raise
    except Exception:
        _trace_to_log(run.path)
        raise
    finally:
        display.stop()
        run.close()


def _open(recipe: Any, line: str, options: Options, here: Place) -> Run:
    """The run directory, with the other processes if there are some."""
    from rlhf_cli.runs.directory import Run

    asked = getattr(recipe, "distributed", None)
    if here.world == 1 and asked is not None and asked.sequence_parallel > 1:
        raise RecipeError(f"{asked.sequence_parallel} processes are to share each sequence, and there is one",
                          "distributed.sequence_parallel", "start them with torchrun, or set 1")  # fmt: skip
    if not _meets(recipe, here):
        return Run.open(recipe, line, options.resume)
    from rlhf_cli.stages.company import open_together

    return open_together(recipe, line, options.resume, here, recipe.distributed)


def _meets(recipe: Any, here: Place) -> bool:
    """Whether torch.distributed takes part: for others, or for layers in main memory."""
    asked = getattr(recipe, "distributed", None)
    return here.world > 1 or (asked is not None and asked.cpu_offload)


def line_of(context: typer.Context) -> str:
    """The command line, for run.json."""
    return shlex.join(["rlhf", *context.obj])


def _trace_to_log(path: Path) -> None:
    """The traceback goes into the log of the run that was under way, if there is one."""
    if (path / "run.json").is_file():
        with suppress(OSError), (path / "run.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(traceback.format_exc())
