"""How much is in memory at once: the rules by numbers, what a forward keeps, and that no rule changes a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_cli.models import checkpointing, memory
from rlhf_cli.models.checkpointing import Footprint
from rlhf_cli.models.device import Tokens
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Plain
from rlhf_cli.train.engine import Engine
from rlhf_cli.train.fitting import layers_to_recompute, tokens_that_fit
from tests.models.worlds import CPU, full_role, lora_role, make_base
from tests.properties.test_engine import likelihood, pairs, scored
from tests.runs.helpers import make_recipe

NEEDS = Footprint(layers=10, layer=100.0, weights=1000.0, border=10.0, rest=50.0)


def test_the_fewest_layers_are_recomputed() -> None:
    """With k of 10: 100 (11 - k) + 10 k + 50 = 1150 - 90 k bytes a token, and 11000 - 1000 k besides."""
    assert layers_to_recompute(NEEDS, 100, 100 * 1150 + 11000) == 0
    assert layers_to_recompute(NEEDS, 100, 100 * 1150 + 11000 - 1) == 1
    assert layers_to_recompute(NEEDS, 100, 100 * (1150 - 360) + 11000 - 4000) == 4
    assert layers_to_recompute(NEEDS, 200, 100 * 1150 + 11000) == 7, "241000 - 19000 k"
    assert layers_to_recompute(NEEDS, 100, -5.0) == 10


def test_tokens_are_a_power_of_two_that_fits() -> None:
    allowed = Tokens(64, 1024, 4096)
    assert tokens_that_fit(10.0, 100.0, 10 * 512 + 100, allowed) == 512
    assert tokens_that_fit(10.0, 100.0, 10 * 512 + 99, allowed) == 256
    assert tokens_that_fit(10.0, 100.0, 10 * 900 + 100, allowed) == 512, "what is free a little more or less"
    assert tokens_that_fit(10.0, 0.0, -1.0, allowed) == 64
    assert tokens_that_fit(10.0, 0.0, 1e12, allowed) == 4096
    assert tokens_that_fit(0.0, 0.0, 1e12, allowed) == 4096


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # the latter keeps attention matrices: more the longer
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_small_forward_says_what_a_large_one_keeps(name: str, kind: str) -> None:
    base = make_base(name)
    role = full_role(base) if kind == "full" else lora_role(base, "policy")
    checkpointing.enable(base.model, "auto")
    needs = checkpointing.footprint(role, 200)
    assert checkpointing.recomputed(base.model) == needs.layers == 2
    checkpointing.recompute(base.model, 0)
    own, kept = {p.untyped_storage().data_ptr() for p in base.model.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() * (storage.data_ptr() not in own)
        return tensor

    with role.active(train=True), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        graph = checkpointing.passed(role, checkpointing.made_up(role, 200, 2))
    known = sum(kept.values())
    del graph
    said = 400 * (needs.each(0) - needs.layer) + needs.fixed(0) - needs.weights
    assert said == pytest.approx(known, rel=0.03 if name == "llama" else 0.25)
    if base.packed:
        assert checkpointing.bound(role).each(0) > 2 * needs.each(0)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_step_is_the_same_to_the_bit_however_many_layers_are_recomputed(tmp_path: Path, kind: str) -> None:
    results = []
    for count in (None, 0, 1, 2):
        base = make_base("llama")
        role = full_role(base) if kind == "full" else lora_role(base, "policy")
        if count is not None:
            checkpointing.enable(base.model, "auto")
            checkpointing.recompute(base.model, count)
            assert checkpointing.recomputed(base.model) == count
        root = tmp_path / str(count)
        root.mkdir()
        run = Run.open(make_recipe(root, micro_batch_tokens=64), "rlhf sft", "auto")
        run.begin({})
        engine = Engine(run.recipe, run, Plain(quiet=True), 2, packed=True)
        engine.add(role, 1e-2)
        forwards = [0]
        base.model.model.layers[0].input_layernorm.register_forward_hook(
            lambda *_, seen=forwards: seen.__setitem__(0, seen[0] + 1)
        )
        metrics = [engine.update(role, pairs(seed), likelihood(role), scored(pairs(seed))) for seed in (1, 2)]
        results.append((metrics, role.tensors(), forwards[0]))
    plain, *others = results
    for metrics, tensors, _ in others:
        assert metrics == plain[0]
        assert [name for name in tensors if not torch.equal(tensors[name], plain[1][name])] == []
    assert [forwards // plain[2] for _, _, forwards in others] == [1, 2, 2], "the first layer's forwards"


def test_more_layers_until_there_are_none() -> None:
    model = make_base("llama").model
    assert (checkpointing.recompute_more(model), checkpointing.recomputed(model)) == (0, 0), "never enabled"
    checkpointing.enable(model, "auto")
    checkpointing.recompute(model, 0)
    assert [checkpointing.recompute_more(model) for _ in range(3)] == [1, 2, 0]


def test_a_control_group_bounds_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    assert memory.room(CPU) > 2**20
    for folder, limit, used in (
        (tmp_path, "memory.max", "memory.current"),
        (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        folder.mkdir(exist_ok=True)
        (folder / limit).write_text("500000\n")
        (folder / used).write_text("300000\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 1000\n")
    assert memory.room(CPU) == 201000
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("max\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.room(CPU) > 2**20, "no limit"


def test_what_running_out_of_memory_looks_like() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert memory.ran_out(caught.value)
    assert memory.ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    assert not memory.ran_out(RuntimeError("shapes differ"))
