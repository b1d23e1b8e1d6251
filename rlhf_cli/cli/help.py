"""How `--help` looks: commands and options in groups, examples at the end. And what the shell completes."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from rlhf_cli.catalog import STAGES
from rlhf_cli.cli.examples import EXAMPLES
from rlhf_cli.errors import RecipeError

RUN, SHOWN = "What it does", "What it shows"
"""Groups of options, besides those of the command alone."""
_TRAIN, _DATA, _LOOK, _BEGIN, _TOLD = "Train", "Make and judge data", "Look at runs", "Begin and check", "Look up"
_GROUPS = {
    **{name: _TRAIN if stage.trains else _DATA for name, stage in STAGES.items()},
    **dict.fromkeys(("report", "chat", "merge"), _LOOK),
    **dict.fromkeys(("init", "check", "plan", "data", "deps", "serve-rollouts"), _BEGIN),
    **dict.fromkeys(("list", "explain", "schema", "env"), _TOLD),
}
INSTALLS = ("--install-completion", "--show-completion")


class _Examples:
    """Writes the examples of a command after its epilog."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        super().format_epilog(ctx, formatter)  # type: ignore[misc]
        name = "" if ctx.parent is None else ctx.info_name
        if found := EXAMPLES.get(name):
            with formatter.section("Examples"):
                formatter.write("".join(f"{'':>{formatter.current_indent}}{line}\n" for line in found))


class Command(_Examples, TyperCommand):
    """A command whose options stand in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], RUN: [], SHOWN: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups[getattr(parameter, "rich_help_panel", None) or usual].append(record)
        groups[SHOWN] += [record for record in groups["Options"] if "--help" in record[0]]
        groups["Options"] = [record for record in groups["Options"] if "--help" not in record[0]]
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Group(_Examples, TyperGroup):
    """Commands in groups, in the order in which people need them."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        names = [name for name in self.list_commands(ctx) if not self.commands[name].hidden]
        for title in (_BEGIN, _TRAIN, _DATA, _LOOK, _TOLD):
            rows = [(n, self.commands[n].get_short_help_str(200)) for n in names if _GROUPS[n] == title]
            with formatter.section(title):
                formatter.write_dl([(name.ljust(max(map(len, names))), words) for name, words in rows])


def dress(app: typer.Typer) -> None:
    """Give every command of an application this look."""
    for info in app.registered_commands:
        info.cls = Command


def check_shell(arguments: list[str]) -> None:
    """Raises RecipeError when a completion is asked for and the shell around this process cannot be told."""
    if not arguments or arguments[0] not in INSTALLS:
        return
    import shellingham

    try:
        shellingham.detect_shell()
    except (shellingham.ShellDetectionFailure, OSError) as error:
        raise RecipeError("which shell this is cannot be told", arguments[0],
                          "type it in bash, zsh or fish") from error  # fmt: skip
