"""`rlhf data`: what a recipe's data look like, on the terminal or as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_cli.errors import RecipeError

PAGE = "data.html"


def show(path: str, overrides: Sequence[str], rows: int, html: str | None) -> None:
    """Show a recipe's data. Raises RlhfError."""
    from rich.console import Console
    from rich.text import Text

    from rlhf_cli.recipe.reader import read_recipe
    from rlhf_cli.recipe.schema import Recipe

    if html is not None:
        _check(html)
    recipe = read_recipe(path, overrides, None)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"shows what a command trains on, and rlhf {recipe.stage} trains nothing", "rlhf data",
                          f"rlhf {recipe.stage} {path} --dry-run tells of its data")  # fmt: skip
    from rlhf_cli.stages.show import KINDS, STYLES, histogram, page, view

    found = view(recipe, rows)
    if html is not None:
        Console(stderr=True).print(page(html, f"Data of {path}", found), highlight=False, soft_wrap=True)
        return
    console = Console()

    def line(*parts: tuple[str, str]) -> None:
        text = Text()
        for words, style in parts:
            text.append(words, style)
        console.print(text, soft_wrap=True)

    line(*((f"{words}  ", STYLES[kind]) for kind, words in KINDS.items()))
    for one in found.examples:
        line(("", ""))
        line((f"{one.split} {one.where}: {one.fate}", "bold"))
        lines = [("prompt", one.prompt), *one.completions] if one.prompt else one.completions
        for name, stretches in lines:
            line((f"{name}: ", "cyan"), *((s.text, STYLES[s.kind]) for s in stretches))
    for split, lengths in found.lengths.items():
        line(("", ""))
        line((f"tokens of {split} examples", "bold"))
        for bar in histogram(lengths, found.limit):
            line((bar, ""))
    line(("", ""))
    for words in found.lines:
        line((words, "yellow" if words.startswith("warning") else ""))


def _check(html: str) -> None:
    """Raises RecipeError where no page can be written, as `rlhf report` does."""
    from rlhf_cli.runs.files import writable_file

    path, where = Path(html), f"--html {html or repr(html)}"
    if html.endswith("/") or path.is_dir():
        raise RecipeError("is a folder", where, f"name a file: --html {path / PAGE}")
    if path.suffix.lower() not in (".html", ".htm"):
        raise RecipeError("does not end in .html", where, f"name a page: --html {path.with_suffix('.html')}")
    writable_file(path, where, "name another file")
