"""The command line. Stage commands come from the catalogue; nothing here imports torch before a recipe was accepted."""

from __future__ import annotations

import errno
import gc
import json
import logging
import shlex
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_cli.catalog import STAGES
from rlhf_cli.cli import tools
from rlhf_cli.cli.explain import explanation, on_terminal
from rlhf_cli.errors import ModelError, Problem, RecipeError, RlhfError
from rlhf_cli.runs.options import Options

BROKEN_PIPE = 141
HINT_FULL = "free some space, then run the same command again to resume"
NO_MEMORY = (
    "can't allocate memory", "Cannot allocate memory", "failed to map segment", "can't start new thread",
)  # fmt: skip
"""How the system, and the libraries on it, say that memory ran out."""
HINT_MEMORY = "lower data.max_length or training.micro_batch_tokens, or set model.quantization: nf4 with lora"

app = typer.Typer(
    name="rlhf",
    help="Align a language model on your own GPU: SFT, reward models, PPO and the DPO family from YAML recipes.",
    epilog="A recipe says everything; `rlhf schema` prints what it may hold, `rlhf list` shows the objectives.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
        tools.silence_stdout()
        raise typer.Exit(BROKEN_PIPE) from None


# --- stages ----------------------------------------------------------------------------------------------


def _add_stage(name: str, help: str) -> None:
    """Add the command that trains with that stage's code."""

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
        _train(name, recipe, overrides, Options(resume, dry_run, debug), quiet, verbose, _line(context))

    app.command(name, help=f"{help}.", no_args_is_help=False)(command)


def _add_data_stage(name: str, help: str) -> None:
    """Add the command that makes data with that stage's code."""

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
        _train(name, recipe, overrides, Options(resume, dry_run, debug), quiet, verbose, _line(context))

    app.command(name, help=f"{help}.", no_args_is_help=False)(command)


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
    _train("sample", recipe, overrides, Options(resume, dry_run, debug), quiet, verbose, _line(context))


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

    if as_json and dry_run:
        raise RecipeError("--json and --dry-run exclude each other: a dry run has no figures", "command line")
    more = [f"against=[{', '.join(map(quote, against))}]"] if against else []
    overrides = [*(bare or []), *(sets or []), *_shorthands(output_dir, None, seed, None), *more]
    path = _train("eval", recipe, overrides, Options(resume, dry_run, debug), quiet, verbose, _line(context))
    if as_json:
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
    from rlhf_cli.runs.directory import Run

    if quiet and verbose:
        raise RecipeError("--quiet and --verbose exclude each other", "command line")
    recipe = inherit_adapter(read_recipe(path, overrides, stage))
    display = make_display(quiet, verbose)
    run = Run.open(recipe, line, options.resume)
    try:
        if run.status == "done":
            display.note(f"{run.path}: up to date")
            return run.path
        train = STAGES[stage].load()
        tools.watch_garbage()
        train(recipe, run, display, options)
        return run.path
    except RlhfError:
        raise
    except Exception:
        _trace_to_log(run.path)
        raise
    finally:
        display.stop()
        run.close()


def _line(context: typer.Context) -> str:
    """The command line, for run.json."""
    return shlex.join(["rlhf", *context.obj])


def _trace_to_log(path: Path) -> None:
    """The traceback goes into the log of the run that was under way, if there is one."""
    if (path / "run.json").is_file():
        with suppress(OSError), (path / "run.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(traceback.format_exc())


_OWN_OPTIONS: dict[str, Any] = {"sample": _sample, "eval": _eval}
for _stage in STAGES.values():
    if _stage.name in _OWN_OPTIONS:
        app.command(_stage.name, help=f"{_stage.help}.", no_args_is_help=False)(_OWN_OPTIONS[_stage.name])
    elif _stage.trains:
        _add_stage(_stage.name, _stage.help)
    else:
        _add_data_stage(_stage.name, _stage.help)


# --- tools -----------------------------------------------------------------------------------------------


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        emit(f"rlhf {version('rlhf-cli')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def check(
    context: typer.Context,
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="YAML recipes.", show_default=False)],
    sets: Sets = None,
    debug: Debug = False,
) -> None:
    """Check recipes and their data; no model is loaded."""
    tools.watch_garbage()
    errors: list[RlhfError] = []
    for path in recipes:
        try:
            say(tools.check_one(path, sets or [], _line(context)))
        except RlhfError as error:
            errors.append(error)
    if errors:
        raise tools.together(errors)


@app.command()
def deps(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="YAML recipes.", show_default=False)],
    sets: Sets = None,
    debug: Debug = False,
) -> None:
    """Print rules for make: each recipe's run, and what it is made of."""
    from rlhf_cli.cli.deps import rules

    emit(rules(recipes, sets or []).rstrip("\n"))


@app.command()
def init(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A new or empty folder.", show_default=False)],
    model: Annotated[str | None, typer.Option("--model", help="Hub id or folder of the model to start from.")] = None,
    quantization: Annotated[str, typer.Option(metavar="none|nf4|int8", help="Of its frozen weights.")] = "nf4",
    debug: Debug = False,
) -> None:
    """Write a starter project: recipes, example data, a Makefile."""
    from rlhf_cli.cli.init import MODEL, start

    _one_of("--quantization", quantization, ("none", "nf4", "int8"))
    for path in start(folder, model or MODEL, quantization):
        say(str(path))
    say(f"next: cd {shlex.quote(folder)}, put your data into data/, then `make check` and `make`")


@app.command()
def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A LoRA run, or a folder with an adapter.")],
    output_dir: Annotated[str, typer.Option("--output-dir", "-o", metavar="DIR", help="A new folder.")],
    weights: Annotated[
        str, typer.Option(metavar="original|trained", help="Into which weights, where the base was quantised.")
    ] = "original",
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Of the merged weights.")
    ] = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Work a run's adapter into its base: a full model that opens without peft."""
    _one_of("--weights", weights, ("original", "trained"))
    _one_of("--dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    from rlhf_cli.cli.view import make_display
    from rlhf_cli.stages.merge import run as work

    tools.watch_garbage()
    work(run, output_dir, weights, dtype, make_display(quiet, False))  # type: ignore[arg-type]


@app.command()
def chat(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="One model to talk to, or several side by side.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1.0, help="Sample from the likeliest tokens only.")] = 1.0,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides what is drawn.")] = 0,
    quantization: Annotated[
        str, typer.Option(metavar="auto|none|nf4|int8", help="Of the base weights; auto: as the run was trained.")
    ] = "auto",
    debug: Debug = False,
) -> None:
    """Talk to a run; a line a turn."""
    _one_of("--quantization", quantization, ("auto", "none", "nf4", "int8"))
    from rlhf_cli.rollouts.sampling import Sampling
    from rlhf_cli.stages.chat import run as talk

    tools.watch_garbage()
    sampling = Sampling(
        max_new_tokens, temperature or 1.0, greedy=temperature == 0, top_p=None if top_p == 1 else top_p
    )
    talk(runs, sampling, system, seed, None if quantization == "auto" else quantization)  # type: ignore[arg-type]


def _one_of(option: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise RecipeError(f"'{given}' is not one of {', '.join(known)}", option)


@app.command()
def schema(
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="A command; default: all.")] = None,
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    emit(tools.schema_text(stage))


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    debug: Debug = False,
) -> None:
    """Show the commands, and the objectives, estimators and controllers of each."""
    if as_json:
        emit(json.dumps(tools.catalogue(), indent=2, ensure_ascii=False))
        return
    for line in tools.catalogue_lines():
        say(line)


@app.command()
def explain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An objective, estimator, controller or command.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    debug: Debug = False,
) -> None:
    """Show what an objective is: formula, settings, data, source, and what often goes wrong."""
    found = explanation(name)
    emit(json.dumps(found, indent=2, ensure_ascii=False) if as_json else on_terminal(found))


@app.command()
def env(debug: Debug = False) -> None:
    """Show versions and devices."""
    for line in tools.environment_lines():
        say(line)


# --- the way out -----------------------------------------------------------------------------------------

_CLICK_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """The console script: run the command line and exit with the code of CONTRACT section 2."""
    gc.disable()  # imports leave no garbage, and collections are a fifth of their time
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that are not installed
    sys.exit(run_command_line(sys.argv[1:]))


def run_command_line(arguments: list[str]) -> int:
    """Run one command line and report every error on stderr. Returns the exit code."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("rlhf", list(arguments) or ["--help"], obj=tuple(arguments)) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return leave.exit_code
    except BaseException as error:
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        return _report(error, "--debug" in arguments)
    return 0


def _report(error: BaseException, debug: bool) -> int:
    known: RlhfError | None
    if debug:
        say("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, _CLICK_ERROR):
        known = _usage(error)
    elif isinstance(error, KeyboardInterrupt | typer.Abort):
        say("error: interrupted")
        return 130
    else:
        known = error if isinstance(error, RlhfError) else _hardware(error)
    if known is None:
        kind = " ".join(f"{type(error).__name__}: {error}".split())
        known = RlhfError(Problem(f"{kind}; this is a bug of rlhf", hint="run again with --debug for the traceback"))
    for problem in known.problems:
        say(f"error: {problem}")
    return known.exit_code


def _usage(error: Any) -> RecipeError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "rlhf"
    return RecipeError(Problem(error.format_message(), path, f"{path} --help shows the usage"))


def _hardware(error: BaseException) -> RlhfError | None:
    """Memory or disk that ran out, reported as such; None for anything else."""
    torch = sys.modules.get("torch")
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    if isinstance(error, MemoryError) or on_device or any(words in str(error) for words in NO_MEMORY):
        return ModelError(f"out of memory: {error}".removesuffix(": "), hint=HINT_MEMORY)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelError(f"the disk is full: {error}", hint=HINT_FULL)
    return None
