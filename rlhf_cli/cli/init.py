"""`rlhf init`: a starter project, recipes with data and a Makefile that chains them. No torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from rlhf_cli.data.sources import looks_like_hub_id
from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.recipe.local_model import look
from rlhf_cli.recipe.reader import quote
from rlhf_cli.runs.files import writable

PLACES = {
    "recipes": ("sft.yaml", "rm.yaml", "dpo.yaml", "ppo.yaml", "chat.jinja"),
    "data": ("sft.jsonl", "pairs.jsonl", "prompts.jsonl"),
    "": ("Makefile", "README.md", "gitignore"),
}
"""Folder of the project -> its files, as they lie in cli/starter/."""
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
LENGTH, ANSWER = 1024, 256
"""Tokens of an example and of what PPO samples, where the model has room for them."""


def _model(name: str) -> str:
    """The model as the recipes of the project name it: a folder by its whole path, since they run elsewhere. Raises
    RecipeError when it is neither a folder nor spelled like a hub id."""
    if name and Path(name).is_dir():
        return str(Path(name).resolve())
    if not looks_like_hub_id(name):
        raise RecipeError("no such folder, and not spelled like a hub id", f"--model {name}".rstrip(), "org/name")
    return name


def _fitting(model: str) -> dict[str, str]:
    """What the recipes take from the model, as far as its folder tells. Raises ModelError for one that is none."""
    told = look(model)
    length = LENGTH if told.context is None else min(LENGTH, told.context)
    template = ", chat_template: recipes/chat.jinja" if told.template is False else ""
    return {"MODEL": quote(model), "LENGTH": str(length), "ANSWER": str(min(ANSWER, length // 2)), "TEMPLATE": template}


def start(folder: str, model: str, quantization: str) -> list[Path]:
    """Write a project into a folder that is new or empty; the files. Raises RecipeError and ModelError."""
    root = Path(folder)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise RecipeError("is there already and not empty", folder, "choose another folder")
    writable(root, folder, "choose another folder")
    filled = {**_fitting(_model(model)), "QUANTIZATION": quantization, "NAME": root.resolve().name}
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
