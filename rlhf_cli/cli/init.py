"""`rlhf init`: a starter project, recipes with data and a Makefile that chains them. No torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.recipe.reader import quote

PLACES = {
    "recipes": ("sft.yaml", "rm.yaml", "dpo.yaml", "ppo.yaml"),
    "data": ("sft.jsonl", "pairs.jsonl", "prompts.jsonl"),
    "": ("Makefile", "README.md", "gitignore"),
}
"""Folder of the project -> its files, as they lie in cli/starter/."""
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def start(folder: str, model: str, quantization: str) -> list[Path]:
    """Write a project into a folder that is new or empty; the files. Raises RecipeError and ModelError."""
    root = Path(folder)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise RecipeError("is there already and not empty", folder, "choose another folder")
    filled = {"MODEL": quote(model), "QUANTIZATION": quantization, "NAME": root.resolve().name}
    made: list[Path] = []
    try:
        for place, names in PLACES.items():
            (root / place).mkdir(parents=True, exist_ok=True)
            for name in names:
                text = files("rlhf_cli.cli").joinpath("starter", name).read_text(encoding="utf-8")
                for word, value in filled.items() if name.endswith((".yaml", ".md")) else ():
                    text = text.replace(word, value)
                made.append(root / place / name.replace("gitignore", ".gitignore"))
                made[-1].write_text(text, encoding="utf-8")
    except OSError as error:
        raise ModelError(f"cannot be written: {error.strerror}", str(error.filename or folder)) from error
    return made
