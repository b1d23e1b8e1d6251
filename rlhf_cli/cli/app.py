"""The command line. Stage commands come from the catalogue; nothing here imports torch before a recipe was accepted."""

from __future__ import annotations

import errno
import gc
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_cli.catalog import ESTIMATORS, OBJECTIVES, STAGES
from rlhf_cli.cli.commands import commands
from rlhf_cli.cli.help import Group, check_shell, dress
from rlhf_cli.cli.options import emit, say
from rlhf_cli.cli.stages import add_stages
from rlhf_cli.errors import ModelError, Problem, RecipeError, RlhfError
from rlhf_cli.recipe.glance import stage_of
from rlhf_cli.runs.place import place

HINT_FULL = "free some space, then run the same command again to resume"
NO_MEMORY = (
    "can't allocate memory", "Cannot allocate memory", "failed to map segment", "can't start new thread",
)  # fmt: skip
"""How the system, and the libraries on it, say that memory ran out."""
HINT_MEMORY = "lower data.max_length or training.micro_batch_tokens, or set model.quantization: nf4 with lora"

PATIENCE = 5.0
"""Seconds that a process leaves to the first of its machine to tell of an error, and to each before it a little."""
NO_FOLDER = "No usable temporary directory"
"""How Python says that neither TMPDIR nor the folders that come after it can be written."""
_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Set by torchrun."""

app = typer.Typer(
    name="rlhf",
    help="Align a language model on your own GPU: SFT, reward models, PPO and the DPO family from YAML recipes.",
    epilog="A recipe says everything; `rlhf schema` prints what it may hold, `rlhf list` shows the objectives.",
    cls=Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        emit(f"rlhf {version('rlhf-cli')}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    command = context.invoked_subcommand
    if command not in STAGES and (here := place()).world > 1:
        raise RecipeError(f"rlhf {command} runs in one process, and here are {here.world}", "torchrun",
                          f"start it as rlhf {command}")  # fmt: skip


add_stages(app)
app.registered_commands += commands.registered_commands
dress(app)

# --- the way out -----------------------------------------------------------------------------------------

_CLICK_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """The console script: run the command line and exit with the code of CONTRACT section 2."""
    gc.disable()  # imports leave no garbage, and collections are a fifth of their time
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that are not installed
    if _TORCHRUN in os.environ and "--debug" not in sys.argv:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # frames of C++ would hide the line on who is gone
    if "_RLHF_COMPLETE" in os.environ:
        typer.main.get_command(app).main(prog_name="rlhf")
    sys.exit(run_command_line(sys.argv[1:]))


def run_command_line(arguments: list[str]) -> int:
    """Run one command line and report every error on stderr. Returns the exit code."""
    command = typer.main.get_command(app)
    try:
        check_shell(arguments)
        with command.make_context("rlhf", list(arguments) or ["--help"], obj=tuple(arguments)) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return leave.exit_code
    except BaseException as error:
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        return _report(error, arguments)
    return 0


def _report(error: BaseException, arguments: list[str]) -> int:
    debug = "--debug" in arguments
    known: RlhfError | None
    if debug:
        say("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, _CLICK_ERROR):
        known = _usage(error, arguments)
    elif isinstance(error, KeyboardInterrupt | typer.Abort):
        say("error: interrupted")
        return 130
    else:
        known = error if isinstance(error, RlhfError) else _hardware(error)
    if known is None:
        kind = " ".join(f"{type(error).__name__}: {error}".split())
        known = RlhfError(Problem(f"{kind}; this is a bug of rlhf", hint="run again with --debug for the traceback"))
    for problem in known.problems if _speaks(error) else ():
        say(f"error: {_who()}{problem}")
    return known.exit_code


def _speaks(error: BaseException) -> bool:
    """Whether it is for this process to tell: of several that fail, the first one; before they have met, the first of
    each machine. The others wait: torchrun ends them when that one has failed as well."""
    met = sys.modules.get("rlhf_cli.models.processes")
    if met is not None and met.met():
        return bool(met.speaks(error))
    local = os.environ.get("LOCAL_RANK", "0") if _TORCHRUN in os.environ else "0"
    time.sleep(PATIENCE + int(local) / 2 if local.isdigit() and local != "0" else 0.0)
    return True


def _who() -> str:
    """Names the process where it is not the first of several."""
    rank = os.environ.get("RANK", "0") if _TORCHRUN in os.environ else "0"
    return f"process {rank}: " if rank != "0" else ""


def _usage(error: Any, arguments: list[str]) -> RecipeError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "rlhf"
    hint = f"{path} --help shows the usage"
    recipe = next(((name, stage) for name in arguments if (stage := stage_of(Path(name)))), None)
    word = next((name for name in arguments if not name.startswith("-")), "")
    if path == "rlhf" and (belongs := _belongs(word)) is not None:
        hint = f"{word} is set in a recipe: {belongs[1]}, for rlhf {belongs[0]}"
        hint += f" {recipe[0]}" if recipe is not None and recipe[1] == belongs[0] else ""
    elif path == "rlhf" and recipe is not None:
        hint = f"try: rlhf {recipe[1]} {recipe[0]}"
    elif "option" in error.format_message() and path.removeprefix("rlhf ") in STAGES:
        hint += "; settings of the recipe are given as KEY.PATH=VALUE"
    return RecipeError(Problem(error.format_message(), path, hint))


def _belongs(word: str) -> tuple[str, str] | None:
    """The command and the key of a recipe for the name of an objective or an estimator."""
    if word in OBJECTIVES:
        return OBJECTIVES[word].stage, f"objective.name: {word}"
    return ("ppo", f"ppo.advantage.name: {word}") if word in ESTIMATORS else None


def _hardware(error: BaseException) -> RlhfError | None:
    """Memory or disk that ran out, reported as such; None for anything else."""
    torch = sys.modules.get("torch")
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    if isinstance(error, MemoryError) or on_device or any(words in str(error) for words in NO_MEMORY):
        return ModelError(f"out of memory: {error}".removesuffix(": "), hint=HINT_MEMORY)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelError(f"the disk is full: {error}", hint=HINT_FULL)
    if isinstance(error, FileNotFoundError) and NO_FOLDER in str(error):
        return ModelError(f"no temporary file can be written: {error.strerror}", hint="free some space, or set TMPDIR")
    return None
