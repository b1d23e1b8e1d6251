"""A language model that is asked which of two completions is better."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlhf_cli.recipe.settings.blocks import Checked, Count, Name, as_mapping
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.recipe.settings.rollout import LONGEST, Address, Variable

PLACE = re.compile(r"\{\w+\}")
PLACES = ("{prompt}", "{a}", "{b}", "{principle}")
QUESTION = """Two answers to the same request are compared.

Request:
{prompt}

Answer A:
{a}

Answer B:
{b}

Which answer is better? Say A or B."""
BY_PRINCIPLE = QUESTION.replace("Which answer is better?", "Which answer is better by this principle: {principle}")


class JudgeSettings(Checked):
    model: Annotated[ModelSettings, as_mapping("name_or_path", ModelSettings)]
    """The model that judges, by its chat template."""
    question: str | None = None
    """What it is asked; {prompt}, {a}, {b} and {principle} stand for the texts. null: a plain question."""
    system: str | None = None
    """A system message before the question."""
    labels: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=2)] = ["A", "B"]
    """What it says when the first, or the second, completion is better; their probabilities are the judgement."""
    principles: Name | None = None
    """A text file with a principle a line (a constitution); each comparison goes by one of them, drawn by the seed."""
    both_orders: bool = True
    """Ask twice, in either order, and take the mean: a liking for one place cancels out."""
    engine: Literal["own", "vllm"] = "own"
    """own: its weights are read here; vllm: a vLLM server that holds them is asked."""
    server: Address | None = None
    """Address of the vLLM server, `http://127.0.0.1:8001`, started with `vllm serve MODEL`."""
    server_timeout: Annotated[float, Field(gt=0, le=LONGEST)] = 600.0
    """Seconds that the server may take for an answer, waiting in its queue included."""
    api_key_env: Variable | None = None
    """The environment variable that holds the server's API key. The key itself stands in no recipe, log or run."""
    max_batch: Count = 64
    """Questions asked of the server at once."""
    opponents: Literal["all", "next"] = "all"
    """Every two completions of a prompt are compared, or each with the next one (the last with the first)."""

    def contradictions(self) -> Iterator[str]:
        if self.engine == "vllm" and self.server is None:
            yield "engine: vllm asks a server, and judge.server is not given: `server: http://127.0.0.1:8001`"
        if self.engine == "vllm" and self.model.quantization != "none":
            yield "judge.model.quantization is only read with engine: own: a server holds what it was started with"
        yield from self.unread(("server", "server_timeout", "api_key_env", "max_batch"), "engine", "vllm")
        if self.labels[0] == self.labels[1]:
            yield "labels are the same"
        for part in ("{a}", "{b}"):
            if self.question is not None and part not in self.question:
                yield f"question does not hold {part}, where a completion stands"
        for odd in sorted(set(PLACE.findall(self.question or "")) - set(PLACES)):
            yield f"question holds {odd}, which stands for nothing: there are {', '.join(PLACES)}"
        named = self.question is not None and "{principle}" in self.question
        if named and self.principles is None:
            yield "question asks for a {principle}: give principles"
        if self.question is not None and not named and self.principles is not None:
            yield "principles are read by a question with {principle}: add it, or leave question out"

    @property
    def asked(self) -> str:
        """The question, the usual one where the recipe has none."""
        return self.question or (QUESTION if self.principles is None else BY_PRINCIPLE)
