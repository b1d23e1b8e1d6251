"""distributed.cpu_offload: shares of layers in main memory. On a CPU it is forced here, and must change no bit; what it
does on a card: tests/gpu/test_offload.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_cli.errors import ModelError
from rlhf_cli.models import adapters, mesh
from rlhf_cli.recipe.settings.model import LoraSettings
from rlhf_cli.recipe.settings.training import TrainingSettings
from rlhf_cli.train import fitting, lockstep
from rlhf_cli.train.optim import make_optimizer
from tests import several
from tests.distributed import test_sharding as plain
from tests.distributed.test_sharding import Make, alone, maker, same_numbers, same_tensors
from tests.models.worlds import full_role, make_base
from tests.stages import world as w

OFF = {"distributed": {"shard": "full", "cpu_offload": True, "timeout": 60}}
CARDS = ["cuda", "cpu"]
NF4 = {"model": {"quantization": "nf4"}}
RUNS: dict[str, dict[str, Any]] = {"sft-full": {}, "dpo-lora": NF4}


@pytest.fixture(scope="module")
def make(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tiny_model, tmp_path_factory, RUNS)


@pytest.fixture(scope="module")
def of_two(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By two processes: with parts where the device is, and in what stands for main memory; one of them in two goes.
    And one in which the disk of one process is full when the second checkpoint is written."""
    lines: list[list[object]] = []
    for run in RUNS:
        for where, more in (("here", plain.SHARD), ("away", OFF)):
            content = make(run, where, **more)
            path = w.save(content, Path(content["output_dir"]).with_suffix(".yaml"))
            lines += [[content["stage"], path, "--max-steps", 2]] if where == "away" else []
            lines.append([content["stage"], path])
    full = make("sft-full", "full", **OFF)
    lines.append([full["stage"], w.save(full, Path(full["output_dir"]).with_suffix(".yaml"))])
    kill = {"process": 1, "step": 2, "how": "disk", "command": len(lines) - 1}
    codes, said = several.launch(
        tmp_path_factory.mktemp("lines"), lines, 2, kill, values={"rlhf_cli.models.mesh.CARDS": CARDS}
    )
    assert codes == [*[0] * (len(lines) - 1), 4], said[-3000:]
    out = Path(full["output_dir"]).parent
    (out / "errors").write_text("".join(f"{line}\n" for line in said.splitlines() if line.startswith("error: ")))
    return out


@pytest.mark.parametrize("run", RUNS)
def test_parts_in_main_memory_change_no_bit(of_two: Path, run: str) -> None:
    here, away = of_two / f"{run}-here", of_two / f"{run}-away"
    same_numbers(here, away)
    same_tensors(here / "final", away / "final", limit=0.0)
    last = "checkpoints/step-000004"
    same_tensors(here / last, away / last, limit=0.0)
    told = (away / "run.log").read_text()
    assert "resumed from" in told
    assert "parameters of the base, those of its layers in main memory, all of them while it samples" in told
    assert "those of its layers in main memory" not in (here / "run.log").read_text()


def test_a_full_disk_of_one_process_is_told_by_that_one(of_two: Path) -> None:
    """And not by the first one, which only knows that there is another that has failed."""
    (line,) = (of_two / "errors").read_text().splitlines()
    assert line.startswith("error: process 1: ")
    assert "a part of a checkpoint could not be saved: No space left on device (the last whole checkpoint is " in line
    assert "step-000002; free some space" in line
    assert [path.name for path in (of_two / "sft-full-full" / "checkpoints").iterdir()] == ["step-000002"]


@pytest.fixture
def cards() -> Iterator[None]:
    with patch.object(mesh, "CARDS", CARDS):
        yield


@pytest.mark.usefixtures("cards")
@pytest.mark.parametrize("run", ["sft-full", "ppo-full"])
def test_one_process_can_do_it_too(make: Make, tmp_path: Path, run: str) -> None:
    said = "def lengths(completions, **more):\n    return [float(len(text)) for text in completions]\n"
    (tmp_path / "reward.py").write_text(said, encoding="utf-8")
    rewards = {"rewards": [{"function": f"{tmp_path}/reward.py:lengths"}]} if run == "ppo-full" else {}
    for where, more in (("whole", rewards), ("alone", OFF | rewards)):
        outcome = alone(make(run, where, **more))
        assert outcome.code == 0, outcome.err
    whole, other = (Path(make(run, where)["output_dir"]) for where in ("whole", "alone"))
    same_numbers(whole, other)
    same_tensors(whole / "final", other / "final")
    assert "parameters of the base lie in main memory, none of them while it samples" in (other / "run.log").read_text()


def test_without_a_card_it_says_that_it_has_no_effect(make: Make) -> None:
    outcome = alone(make("sft-lora", "cpu", **OFF, training={"max_steps": 1}))
    assert outcome.code == 0
    assert "a single process has nothing to share out" in outcome.err + outcome.out
    assert "this run computes on the CPU, in whose memory everything is already" in outcome.err + outcome.out
    assert not torch.distributed.is_initialized()


def test_without_shares_it_is_refused(make: Make) -> None:
    outcome = alone(make("sft-lora", "refused", distributed={"cpu_offload": True}), "--dry-run")
    assert outcome.code == 2
    (line,) = outcome.errors
    assert "cpu_offload keeps shares of layers in main memory, and shard is none: set full or hybrid" in line


# --- one device and another, as far as they can be told apart without a card ---------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimiser_steps_each_parameter_where_it_lies(name: Any) -> None:
    """Of a card that is not there, what is placed on it is known, and no numbers."""
    with FakeTensorMode():
        places = {"embedding": "cuda", "part": "cpu", "norm": "cuda", "other part": "cpu"}
        own = [
            (key, torch.nn.Parameter(torch.ones((4,) * (1 + (key != "norm")), device=d))) for key, d in places.items()
        ]
        settings = TrainingSettings(learning_rate=1e-3, optimizer=name)
        optimizer = make_optimizer(own, settings, 1e-3)
        for _, parameter in own:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for key, parameter in own:
            assert parameter.device.type == places[key]
            assert {state.device.type for state in optimizer.state[parameter].values()} <= {places[key]}
            assert len(optimizer.state[parameter]) == {"adamw": 3, "sgd": 0}[name]


def test_adapters_lie_where_is_computed_and_not_where_the_base_does() -> None:
    base = make_base("llama")
    base.device = torch.device("meta")
    adapters.add_adapter(base, "policy", adapters.lora_config(LoraSettings(r=4)))
    own = adapters.adapter_parameters(base, "policy")
    assert {p.device.type for _, p in own} == {"meta"}
    assert {p.device.type for n, p in base.model.named_parameters() if "lora_" not in n} == {"cpu"}


def test_what_lies_elsewhere_takes_nothing_of_the_device() -> None:
    role = full_role(make_base("llama"))
    numbers = sum(p.numel() for _, p in role.parameters)
    recipe = SimpleNamespace(training=TrainingSettings(learning_rate=1e-3))
    engine = cast("Any", SimpleNamespace(recipe=recipe, learners={"policy": SimpleNamespace(role=role)}))
    assert fitting.owed(role, engine) == numbers * (4 + 8 + 4)
    layer = role.base.model.model.layers[1].to("meta")
    elsewhere = sum(p.numel() for p in layer.parameters())
    engine.learners["policy"].role = full_role(role.base)
    assert fitting.owed(engine.learners["policy"].role, engine) == (numbers - elsewhere) * (4 + 8 + 4)


def test_memory_that_runs_out_is_one_line() -> None:
    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ModelError, match="a pass through layers that lie in main memory cannot be repeated") as caught:
        lockstep.together(cast("Any", SimpleNamespace(shards=True)), work, "computing step 3")
    assert caught.value.exit_code == 4
    assert "lower it, or set model.gradient_checkpointing: true" in str(caught.value)
