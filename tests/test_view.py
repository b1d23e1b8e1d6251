"""The live view: what stands on the terminal, how long a run will still take, and that the log stays plain."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from rlhf_cli.catalog import STAGES
from rlhf_cli.cli import view
from rlhf_cli.runs.display import HEADLINES, Pace, headline

PPO = {
    "objective/scores": 1.32, "objective/kl": 3.1217, "completions/mean_length": 33.3, "loss": 0.1,
    "tokens_per_second": 19819.3,
}  # fmt: skip


def shown(live: view.View, width: int) -> list[str]:
    """The lines that stand at the bottom of a terminal."""
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(live)
    return console.export_text().rstrip("\n").split("\n")


def under_way(stage: str = "ppo") -> view.View:
    """After 50 of 200 steps, each of a second."""
    live = view.View(console=Console(file=io.StringIO(), width=80), stage=stage)
    live._pace = Pace(200, 0, 0.0)
    for step in range(1, 51):
        live._pace.reach(step, float(step))
    live._began = time.monotonic() - 50
    live._last = dict(PPO)
    return live


@pytest.mark.parametrize(("width", "count"), [(60, 3), (120, 2), (30, 5)])
def test_everything_is_told_in_lines_that_fit(width: int, count: int) -> None:
    live = under_way()
    with live.phase("rollout", 128):
        live.advance(48)
        found = shown(live, width)
    assert max(map(len, found)) <= width
    said = "\n".join(found)
    for words in ("score 1.320", "kl 3.122", "length 33", "19.8k tokens/s", "GiB memory", "rollout 48/128"):
        assert words in said, words
    assert "loss" not in said
    assert len(found) == count
    if width >= 60:
        assert re.search(r"step 50/200 ━+ +25%  0:50  2:30 left", found[0])


def test_phases_within_phases() -> None:
    live = under_way()
    with live.phase("evaluation"), live.phase("rollout", 10):
        live.advance(4)
        assert "evaluation: rollout 4/10" in "\n".join(shown(live, 100))
        live.advance(20)
        assert "evaluation: rollout 10/10" in "\n".join(shown(live, 100))
    assert "rollout" not in "\n".join(shown(live, 100))
    with pytest.raises(ValueError), live.phase("update"):
        raise ValueError
    assert "update" not in "\n".join(shown(live, 100))


def test_every_command_that_trains_has_its_numbers() -> None:
    assert set(HEADLINES) == {name for name, stage in STAGES.items() if stage.trains}
    assert headline("sft", {"grad_norm": 0.5, "loss": 1.0, "eval/loss": 2.0, "learning_rate": 1e-5}) == [
        "loss 1.0000", "eval loss 2.0000", "grad norm 0.500"
    ]  # fmt: skip
    assert headline("dpo", {"loss": 0.6, "rewards/margins": 0.1, "rewards/accuracies": 0.75, "grad_norm": 1.0}) == [
        "accuracy 0.750", "margin 0.100", "loss 0.6000"
    ]  # fmt: skip
    assert headline("train-rm", {"error/absolute": 0.25, "loss": 0.5}) == ["error 0.250", "loss 0.5000"]
    assert headline("score", {"objective/scores": 0.5, "tokens_per_second": 9.0}) == ["score 0.500"]


def test_the_time_that_is_left() -> None:
    pace = Pace(100, 0, 0.0)
    assert pace.left() is None
    pace.pause(30.0)  # the evaluation before the first step
    pace.reach(1, 40.0)
    assert pace.left() == pytest.approx(99 * 10.0)  # warming up, and all that is known
    for step in range(2, 11):
        pace.reach(step, 40.0 + 2 * (step - 1))
    assert pace.left() == pytest.approx(90 * 2.0)
    pace.pause(9.0)  # an evaluation every ten steps
    for step in range(11, 21):
        pace.reach(step, 67.0 + 2 * (step - 10))
    assert pace.left() == pytest.approx(80 * (2.0 + 9 / 19))
    pace.reach(100, 1000.0)
    assert pace.left() == 0


def test_a_resumed_run_is_judged_by_its_own_steps() -> None:
    pace = Pace(1000, 900, 0.0)
    for step in range(901, 911):
        pace.reach(step, 3.0 * (step - 900))
    assert pace.left() == pytest.approx(90 * 3.0)
    pace.reach(890, 33.0)  # rolled back
    assert pace.left() == pytest.approx(110 * 3.0)


def test_clocks() -> None:
    found = [view.clock(s) for s in (0.4, 54, 723, 3600 * 3 + 20 * 60, 86400 * 2 + 3600 * 4 + 600)]
    assert found == ["0:00", "0:54", "12:03", "3:20:00", "2 d 04:10"]


def test_a_terminal_gets_colours_and_the_log_none(tmp_path: Path) -> None:
    stream = io.StringIO()
    live = view.View(console=Console(file=stream, force_terminal=True, width=70, color_system="truecolor"), stage="dpo")
    live.attach(tmp_path / "run.log")
    live.start(20, 5)
    live.warn("odd")
    for step in (6, 7):
        live.step(step, {"loss": 0.5, "rewards/accuracies": 0.75}, True)
    live.stop()
    assert "\x1b[" in stream.getvalue()
    plain = Text.from_ansi(stream.getvalue()).plain
    assert "step 7/20" in plain
    assert "accuracy 0.750   loss 0.5000" in plain
    log = (tmp_path / "run.log").read_text()
    assert "\x1b" not in log
    assert [line[20:] for line in log.splitlines()] == [
        "going on after step 5 of 20", "warning: odd", "step 6/20  loss 0.5000  accuracy 0.750",
        "step 7/20  loss 0.5000  accuracy 0.750",
    ]  # fmt: skip
