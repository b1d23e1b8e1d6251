"""The judge of a recipe, opened: its weights here, or its server."""

from __future__ import annotations

from rlhf_cli.models.build import load_frozen
from rlhf_cli.models.device import micro_batch_range
from rlhf_cli.recipe.settings.distributed import DistributedSettings
from rlhf_cli.recipe.settings.judge import JudgeSettings
from rlhf_cli.rollouts.referee import Referee
from rlhf_cli.rollouts.voices import ServedVoice, Voice, own_voice, served_voice
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.stages.company import tell_shares
from rlhf_cli.train.passes import Frozen


def open_voice(
    judge: JudgeSettings, referee: Referee, longest: int, asked: DistributedSettings, run: Run, display: Display
) -> tuple[Voice, str | None]:
    """Who answers, and the fingerprint of the weights where they are here. longest: tokens of a question with its
    answer. Raises RecipeError and ModelError."""
    text = referee.text
    if judge.engine == "vllm":
        served = served_voice(judge, text, longest, run.path)
        display.note(f"judge: {text.path.name}, of {judge.server}")
        return served, None
    role = load_frozen(judge.model, text)
    display.note(f"judge: {text.path.name}, {str(role.base.dtype)[6:]}, on {role.base.device}")
    tell_shares(asked, role.base, display)
    frozen = Frozen(display, micro_batch_range(role.base.device).usual)
    return own_voice(role, frozen.infer), role.base.fingerprint


def close_voice(voice: Voice | None, display: Display) -> None:
    """Leave nothing of this run with a server."""
    if isinstance(voice, ServedVoice):
        voice.server.close(display.warn)
