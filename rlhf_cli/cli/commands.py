"""The commands without a run of their own: they check, show, explain, write files, talk."""

from __future__ import annotations

import json
import shlex
from typing import Annotated

import typer

from rlhf_cli.cli import complete, tools
from rlhf_cli.cli.explain import explanation, on_terminal
from rlhf_cli.cli.options import Bare, Debug, Quiet, RecipeFile, Sets, emit, one_of, say
from rlhf_cli.cli.stages import line_of
from rlhf_cli.errors import RecipeError

commands = typer.Typer()


@commands.command()
def check(
    context: typer.Context,
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE...", help="YAML recipes.", show_default=False, autocompletion=complete.recipes),
    ],
    sets: Sets = None,
    debug: Debug = False,
) -> None:
    """Check recipes and their data; no model is loaded.

    Tokens are not counted: a stage's --dry-run reads the tokenizer, too, and says how many rows are too long."""
    from rlhf_cli.cli.check import check_all

    tools.watch_garbage()
    changes = [word for word in recipes if tools.is_change(word)]
    paths = [word for word in recipes if word not in changes]
    if not paths:
        raise RecipeError("no recipe is named", "rlhf check", "name it before the changes")
    check_all(paths, [*changes, *(sets or [])], line_of(context), say)


@commands.command()
def deps(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE...", help="YAML recipes.", show_default=False, autocompletion=complete.recipes),
    ],
    sets: Sets = None,
    debug: Debug = False,
) -> None:
    """Print rules for make: each recipe's run, and what it is made of."""
    from rlhf_cli.cli.deps import rules

    emit(rules(recipes, sets or []).rstrip("\n"))


@commands.command()
def init(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A new or empty folder.", show_default=False)],
    model: Annotated[str | None, typer.Option("--model", help="Hub id or folder of the model to start from.")] = None,
    quantization: Annotated[str, typer.Option(metavar="none|nf4|int8", help="Of its frozen weights.")] = "nf4",
    debug: Debug = False,
) -> None:
    """Write a starter project: recipes, example data, a Makefile."""
    from rlhf_cli.cli.init import MODEL, start

    one_of("--quantization", quantization, ("none", "nf4", "int8"))
    for path in start(folder, MODEL if model is None else model, quantization):
        say(str(path))
    say(f"next: cd {shlex.quote(folder)}, put your data into data/, then `make check` and `make`")


@commands.command()
def data(
    recipe: RecipeFile,
    bare: Bare = None,
    sets: Sets = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=0, help="Examples of each split.")] = 2,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page instead.")] = None,
    debug: Debug = False,
) -> None:
    """Show examples with the trained tokens coloured, their lengths, and the data report."""
    from rlhf_cli.cli.show import show

    tools.watch_garbage()
    show(recipe, [*(bare or []), *(sets or [])], rows, html)


@commands.command()
def plan(
    recipe: RecipeFile,
    bare: Bare = None,
    sets: Sets = None,
    vram: Annotated[float | None, typer.Option(metavar="GIB", help="Memory of the card it is for.")] = None,
    world_size: Annotated[
        int, typer.Option(metavar="N", help="Processes that torchrun would start; memory is that of each.")
    ] = 1,
    processes_per_machine: Annotated[int | None, typer.Option(metavar="N", help="Of them on each machine.")] = None,
    no_time: Annotated[bool, typer.Option("--no-time", help="Do not estimate how long it takes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    debug: Debug = False,
) -> None:
    """Tell what a run takes, before it is started: parameters, data, memory by part, time; no weights are read.

    Ends with code 4 when it does not fit the card of --vram, or this machine."""
    from rlhf_cli.cli.plan import make

    tools.watch_garbage()
    given = [*(bare or []), *(sets or [])]
    lines, unfit = make(recipe, given, vram, timed=not no_time, as_json=as_json, world=world_size,
                        beside=processes_per_machine)  # fmt: skip
    for line in lines:
        (emit if as_json else say)(line)
    if unfit is not None:
        raise unfit


@commands.command()
def merge(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A LoRA run, or a folder with an adapter.", autocompletion=complete.trained),
    ],
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
    one_of("--weights", weights, ("original", "trained"))
    one_of("--dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    from rlhf_cli.cli.view import make_display
    from rlhf_cli.stages.merge import run as work

    tools.watch_garbage()
    work(run, output_dir, weights, dtype, make_display(quiet, False))  # type: ignore[arg-type]


@commands.command()
def chat(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="One model to talk to, or several side by side.", autocompletion=complete.trained
        ),
    ],
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
    one_of("--quantization", quantization, ("auto", "none", "nf4", "int8"))
    from rlhf_cli.rollouts.sampling import Sampling
    from rlhf_cli.stages.chat import run as talk

    tools.watch_garbage()
    sampling = Sampling(
        max_new_tokens, temperature or 1.0, greedy=temperature == 0, top_p=None if top_p == 1 else top_p
    )
    talk(runs, sampling, system, seed, None if quantization == "auto" else quantization)  # type: ignore[arg-type]


@commands.command("serve-rollouts")
def serve_rollouts(
    recipe: RecipeFile,
    bare: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY.PATH=VALUE... -- OPTION...",
            help="Overrides, the same as --set; behind -- options of vLLM's own.",
        ),
    ] = None,
    sets: Sets = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Another port than that of rollout.server.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of the card's memory; default 0.9, with rollout.sleep 0.5.")
    ] = None,
    vllm: Annotated[
        str | None, typer.Option("--vllm", metavar="PROGRAM", help="The vllm of another environment.")
    ] = None,
    print_: Annotated[bool, typer.Option("--print", help="Print the command on stdout and start nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Start the vLLM server that a recipe with rollout.engine: vllm samples with."""
    from rlhf_cli.cli.serve import installed, serve, server_of

    words = list(bare or [])
    first = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    overrides = [*words[:first], *(sets or [])]
    found = server_of(recipe, overrides, port, gpu_memory_utilization, vllm, words[first:])
    if print_:
        emit(found.line)
        return
    program = installed(vllm)
    say(f"{found.line}\nfor recipes with rollout.server: {found.address}")
    serve(program, found)


@commands.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Run directories, finished or not.", autocompletion=complete.runs),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The page; default: report.html of the run, or here.",
            show_default=False,
        ),
    ] = None,
    x: Annotated[
        str,
        typer.Option(
            "--x",
            metavar="step|tokens|time",
            help="What curves are drawn over.",
            autocompletion=complete.one("step", "tokens", "time"),
        ),
    ] = "step",
    debug: Debug = False,
) -> None:
    """Write the page of a run anew, or one page that compares several."""  # fmt: skip
    one_of("--x", x, ("step", "tokens", "time"))
    from rlhf_cli.report.compare import write

    tools.watch_garbage()
    for line in write(runs, output, x):  # type: ignore[arg-type]
        say(line)


@commands.command()
def schema(
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="A command; default: all.", autocompletion=complete.stages)
    ] = None,
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    emit(tools.schema_text(stage))


@commands.command("list")
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


@commands.command()
def explain(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="An objective, estimator, controller or command.", autocompletion=complete.names
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    debug: Debug = False,
) -> None:
    """Show what an objective is: formula, settings, data, source, and what often goes wrong."""
    found = explanation(name)
    emit(json.dumps(found, indent=2, ensure_ascii=False) if as_json else on_terminal(found))


@commands.command()
def env(debug: Debug = False) -> None:
    """Show versions and devices."""
    for line in tools.environment_lines():
        say(line)
