"""The prompts of a recipe that samples."""

from __future__ import annotations

from dataclasses import replace

from rlhf_cli.data.prepare import Prepared, prepare
from rlhf_cli.models.base import Text
from rlhf_cli.recipe.data_stages import SampleRecipe
from rlhf_cli.recipe.settings.data import DataSettings
from rlhf_cli.runs.display import Display
from rlhf_cli.stages.product import tell


def read_prompts(recipe: SampleRecipe, text: Text, display: Display) -> Prepared:
    """The prompts in the tokens of the model, told about; none longer than leaves room for a completion. Raises
    DataError."""
    settings = recipe.data
    room = settings.max_length - recipe.rollout.max_new_tokens
    asked = DataSettings.model_construct(
        train=settings.prompts, eval=None, max_length=settings.max_length, truncation=settings.truncation,
        on_bad_row=settings.on_bad_row, max_bad_rows=settings.max_bad_rows, cache="off",
    )  # fmt: skip
    found = prepare(asked, "task", text.template, max_length=room)
    report = replace(
        found.report,
        sources=tuple(replace(source, split="prompts") for source in found.report.sources),
        tokens=tuple(replace(tokens, split="prompts") for tokens in found.report.tokens),
    )
    tell(report, display)
    return replace(found, report=report)
