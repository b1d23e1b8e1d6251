"""`rlhf plan`: what several processes hold and send, by hand; how activations are measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.models.base import load_text
from rlhf_cli.models.portions import portions
from rlhf_cli.models.shortened import measure, role_of, shortened
from rlhf_cli.recipe.settings.model import LoraSettings, ModelSettings
from rlhf_cli.stages.plan import KEPT
from rlhf_cli.stages.plan_traffic import Traffic
from tests.stages.test_plan import Toy, planned

# --- several processes ----------------------------------------------------------------------------------------------


def test_what_processes_send_is_the_formula() -> None:
    of = Traffic(world=4, parts=4, replicated=1000, spread=600, matrices=5000, micro_batches=3, updates=2)
    assert of.handed == 2 * 4 * 1000
    assert of.ring == 12_000, "2 x 3/4 of it"
    assert of.gathered == 45_000, "2 updates x 3 micro-batches x 2 x 5,000 x 3/4"
    assert of.scattered == 10_800, "2 updates x 3 micro-batches x 4 bytes x 600 x 3/4"
    assert of.sent == 67_800
    two = replace(of, world=8)  # two machines of four
    assert (two.handed, two.ring, two.copied) == (8000, 14_000, 1200), "2 updates x 4 bytes x 600 / 4 x 2 x 1/2"
    assert two.sent == 14_000 + 45_000 + 10_800 + 1200


def test_processes_share_examples_and_with_full_the_layers(toy: Toy, base: Path, tmp_path: Path) -> None:
    content = toy("sft", "chat", training={"batch_size": 4}) | {"lora": None}
    tensors = load_file(base / "final" / "model.safetensors")
    matrices = [t for name, t in tensors.items() if ".layers." in name and t.ndim == 2]
    halves = sum(math.ceil(len(t) / 2) * t.shape[1] for t in matrices)
    numbers, cut = sum(t.numel() for t in tensors.values()), sum(t.numel() for t in matrices)

    def told(*options: object) -> tuple[dict[str, Any], dict[str, Any]]:
        found = planned(content, tmp_path / "r.yaml", "--vram", 24, *options)
        memory = {p["what"]: p["bytes"] for p in found["memory"]["parts"]} | found["memory"]
        assert found["parameters"]["trained"] == numbers
        return memory, found["communication"]

    alone, none = told()
    two, sent = told("--world-size", 2)
    full, more = told("--world-size", 2, "--set", "distributed.shard=full")
    assert none is None
    assert two["optimiser"] == alone["optimiser"] == 8 * numbers
    assert two["peak"] < alone["peak"], "a process has fewer examples at once"
    assert (sent["handed"], sent["ring"], sent["sent"]) == (4 * numbers, 4 * numbers, 4 * numbers)
    assert alone["weights, float32"] - full["weights, float32"] == 4 * (cut - halves)
    assert (alone["gradients"], full["gradients"]) == (4 * numbers, 4 * (numbers - cut + halves))
    assert full["optimiser"] == 8 * (numbers - cut + halves)
    assert more["handed"] == 4 * (numbers - cut)
    assert more["gathered"] == more["micro_batches"] * 2 * more["matrices"] / 2
    assert more["matrices"] == 4 * cut, "gathered in float32, the dtype of the recipe"
    assert more["scattered"] == more["micro_batches"] * 4 * cut / 2


def test_layers_in_main_memory_are_not_on_the_card(toy: Toy, base: Path, tmp_path: Path) -> None:
    content = toy("sft", "chat", training={"batch_size": 4}) | {"lora": None}
    tensors = load_file(base / "final" / "model.safetensors")
    matrices = [t for name, t in tensors.items() if ".layers." in name and t.ndim == 2]
    numbers, cut = sum(t.numel() for t in tensors.values()), sum(t.numel() for t in matrices)
    away = ("--set", "distributed.shard=full", "--set", "distributed.cpu_offload=true")

    def told(*options: object) -> tuple[dict[str, Any], dict[str, int]]:
        found = planned(content, tmp_path / "r.yaml", *options)["memory"]
        return {p["what"]: p["bytes"] for p in found["parts"]} | found, {p["what"]: p["bytes"] for p in found["main"]}

    whole, nothing = told("--vram", 24)
    card, main = told("--vram", 24, *away)
    assert nothing == {}
    assert whole["weights, float32"] - card["weights, float32"] == 4 * cut
    assert (card["gradients"], card["optimiser"]) == (4 * (numbers - cut), 8 * (numbers - cut))
    pinned = sum(1 << (t.nbytes - 1).bit_length() for t in matrices)
    assert main == {"weights, float32": pinned, "gradients": pinned, "optimiser, adamw": 8 * cut}
    of_two = told("--vram", 24, "--world-size", 2, *away)
    assert of_two[0]["weights, float32"] == card["weights, float32"], "no part on the card, however many there are"
    assert of_two[1]["optimiser, adamw"] == 8 * sum(math.ceil(len(t) / 2) * t.shape[1] for t in matrices)
    assert told(*away)[1] == {}, "without a card there is one memory"


def test_process_0_brings_together_the_model_that_it_writes(toy: Toy, base: Path, tmp_path: Path) -> None:
    content = toy("sft", "chat") | {"lora": None}
    tensors = load_file(base / "final" / "model.safetensors")
    cut = sum(t.numel() for name, t in tensors.items() if ".layers." in name and t.ndim == 2)
    memory = planned(content, tmp_path / "r.yaml", "--world-size", 2, "--set", "distributed.shard=full")["memory"]
    parts = {p["what"]: p["bytes"] for p in memory["parts"]}
    assert memory["together"] == 4 * cut
    moments, held = memory["moments"], memory["idle"] + KEPT + parts["weights, float32"]
    largest = max(t.numel() for t in tensors.values())
    assert moments["writing the model"] == held + memory["optimiser"] + 4 * cut
    assert moments["saving"] == held + memory["optimiser"] + 6 * largest, "each its own parts"
    whole = 4 * sum(t.numel() for t in tensors.values())
    whole += memory["idle"] + KEPT + 6 * largest
    assert moments["loading"] == pytest.approx(whole, abs=4096), "read whole, then cut; buffers besides"


def test_a_file_in_another_dtype_is_there_while_it_is_read(toy: Toy, base: Path, tmp_path: Path) -> None:
    content = toy("sft", "chat", model={"dtype": "bfloat16"})
    tensors = load_file(base / "final" / "model.safetensors")
    memory = planned(content, tmp_path / "r.yaml")["memory"]
    numbers, largest = sum(t.numel() for t in tensors.values()), max(t.numel() for t in tensors.values())
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    held = memory["moments"]["loading"] - memory["idle"] - KEPT
    assert held == pytest.approx((2 + 4) * numbers + 3 * largest, abs=4096), "buffers besides"


# --- how it is measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("rows", "length"), [(300, 12), (40, 100), (2, 2000), (1, 300)])
def test_what_is_measured_is_neither_a_few_tokens_nor_much_the_same_twice(rows: int, length: int, packed: bool) -> None:
    small, large = portions([_sample(length, i) for i in range(rows)], 128, 50, packed=packed)
    assert 110 <= large.ids.numel() <= 150
    assert 0.4 <= small.ids.numel() / large.ids.numel() <= 0.6


def test_activations_a_token_do_not_depend_on_the_length_of_rows_or_the_stage(base: Path) -> None:
    settings = ModelSettings(name_or_path=str(base), dtype="float32")
    seen = []
    for count, length, completions in ((60, 10, 1), (2, 300, 1), (20, 60, 2)):
        with shortened(load_text(settings), settings, trained=False) as short:
            role = role_of(short, LoraSettings(r=8), dropout=False)
            samples = [_sample(length, i, completions) for i in range(count)]
            batches = portions(samples, 128, short.vocabulary, packed=True)
            seen.append(measure(role, lambda r, b: r.logp(b).logp.sum(), batches, timed=False))
    assert [one.packed for one in seen] == [True, True, True]
    for one, rel in zip(seen[1:], (0.1, 0.15), strict=True):  # each of two completions keeps its prompt's keys, too
        assert one.keep.kept.layer.each == pytest.approx(seen[0].keep.kept.layer.each, rel=rel)
        assert one.peak(30, 0, 5000, 0)[0] == pytest.approx(seen[0].peak(30, 0, 5000, 0)[0], rel=rel)
        assert one.peak(30, 30, 5000, 0)[0] == pytest.approx(seen[0].peak(30, 30, 5000, 0)[0], rel=0.2)


def _sample(length: int, seed: int, completions: int = 1) -> Sample:
    """Half of it the prompt."""
    ids = np.random.Generator(np.random.Philox(key=[seed, 1])).integers(0, 50, length).astype(np.int32)
    half = length // 2
    answer = Completion(ids[half:], np.ones(length - half, dtype=bool))
    return Sample(ids[:half], (answer,) * completions, {}, str(seed))
