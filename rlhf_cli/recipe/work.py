"""What every command that works from a recipe shares: a name, a seed, a place, and what it reads. No torch."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from rlhf_cli.recipe.settings.blocks import Checked, Name
from rlhf_cli.recipe.settings.data import SourceSettings
from rlhf_cli.recipe.settings.rewards import RewardSettings


class Work(Checked):
    """A recipe, of whatever command."""

    LAST: ClassVar[tuple[str, ...]] = ("seed", "output_dir")
    """Keys that stand at the end of a recipe."""

    stage: str
    """The command this recipe is for."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Decides everything that is drawn: data order, initial heads and adapters, dropout, sampling."""
    output_dir: Name
    """The run directory."""

    def data_read(self) -> list[SourceSettings]:
        """Every data source."""
        return []

    def models_read(self) -> list[tuple[str, str | None]]:
        """Name and revision of every model but those of rewards."""
        return []

    def texts_read(self) -> list[str]:
        """Settings that are a text, or the name of a file that holds it."""
        return []

    def rewards_read(self) -> list[RewardSettings]:
        """Every reward."""
        return []

    @property
    def trackers(self) -> list[str]:
        """Trackers that are reported to."""
        return []

    @property
    def max_steps(self) -> int | None:
        """Steps after which a training run ends."""
        return None
