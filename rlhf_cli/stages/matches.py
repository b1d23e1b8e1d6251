"""Which completions of two models meet, and what a judge says of them.

The n-th completion of one model meets the n-th of the other. By rewards, every two models meet; a judge is asked about
`model` and each of the others only. Equal completions are a tie that nobody is asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from rlhf_cli.data import rows
from rlhf_cli.data.prepare import Prepared
from rlhf_cli.models.base import check_length, load_text
from rlhf_cli.recipe.evaluation import EvalRecipe
from rlhf_cli.rollouts.referee import Match, Referee, load_referee
from rlhf_cli.rollouts.voices import Voice
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.stages import product
from rlhf_cli.stages.product import Piece
from rlhf_cli.stages.voice import close_voice, open_voice

AT_ONCE = 64
"""Matches of a piece."""


class Matches:
    """The matches of an evaluation; `starts` says where each piece of a judge's work begins."""

    def __init__(
        self, recipe: EvalRecipe, names: Sequence[str], prompts: int, referee: Referee | None, display: Display,
        shortest: int = 0,
    ) -> None:  # fmt: skip
        """shortest: tokens of the longest question with its answer before there are completions."""
        self.shortest = shortest
        self.recipe, self.names, self.prompts, self.referee, self.display = recipe, names, prompts, referee, display
        self.each = recipe.rollout.completions_per_prompt
        several = range(len(names))
        self.pairs = list(combinations(several, 2)) if referee is None else [(0, n) for n in several[1:]]
        count = 0 if referee is None else len(self.pairs) * prompts * self.each
        self.starts = range(0, count, AT_ONCE)
        self._voice: Voice | None = None
        self._said: list[list[dict[str, Any]]] = []

    def pieces(self, start: int, count: int, run: Run) -> Piece:
        """What the judge says of some matches. The completions are those that the run has written."""
        assert self.referee is not None
        voice = self._opened(run)
        if not self._said:
            made = list(product.made_rows(run))
            self._said = [[row for row in made if row["by"]["model"] == name] for name in self.names]
        longest, met, open_ = 0, [], []
        for number in range(start, min(start + count * AT_ONCE, self.starts.stop)):
            pair, place = divmod(number, self.prompts * self.each)
            one, other = (self._said[k][place] for k in self.pairs[pair])
            met.append({"what": "match", "pair": pair, "prompt": one["number"], "index": one["index"],
                        "probability": 0.5, "first": None, "second": None, "mass": None})  # fmt: skip
            if one["completion"] != other["completion"]:
                match = Match(rows.prompt(one), one["completion"], other["completion"], one["where"],
                              self.referee.principle(self.recipe.seed, number))  # fmt: skip
                longest = max(longest, len(self.referee.question(match, swapped=False).prompt))
                open_.append((met[-1], match))
        check_length(
            self.referee.text, longest + max(map(len, self.referee.labels)), "the longest question to the judge"
        )
        opinions = self.referee([match for _, match in open_], voice) if open_ else []
        for (row, _), opinion in zip(open_, opinions, strict=True):
            row |= {"probability": opinion.probability, "first": opinion.first, "second": opinion.second,
                    "mass": opinion.mass}  # fmt: skip
        return Piece([], {"matches": float(len(met))}, met)

    def look(self, run: Run) -> None:
        """Before anything is sampled: whether the judge's server is there, if it has one. Raises as it does."""
        if self.referee is not None and self.referee.settings.engine == "vllm":
            self._opened(run)

    def close(self) -> None:
        """No more is asked."""
        close_voice(self._voice, self.display)

    def _opened(self, run: Run) -> Voice:
        assert self.referee is not None
        if self._voice is None:
            settings, asked = self.referee.settings, self.recipe.distributed
            self._voice, _ = open_voice(settings, self.referee, self.shortest, asked, run, self.display)
        return self._voice


def open_matches(recipe: EvalRecipe, names: Sequence[str], prompts: Prepared | None, display: Display) -> Matches:
    """The matches of a recipe; its judge is loaded without weights, and must have room for the prompts. Raises
    RecipeError, DataError and ModelError."""
    if recipe.judge is None or prompts is None:
        return Matches(recipe, names, 0 if prompts is None else len(prompts.train), None, display)
    referee = load_referee(recipe.judge, load_text(recipe.judge.model))
    bare = [Match(task.prompt, "", "", task.where, principle) for task in prompts.tasks_train
            for principle in referee.principles[:1] or ("",)]  # fmt: skip
    longest = max(len(referee.question(match, swapped=False).prompt) for match in bare)
    longest += max(map(len, referee.labels))
    check_length(referee.text, longest, "the longest question to the judge")
    return Matches(recipe, names, len(prompts.train), referee, display, longest)
