"""Rows whose tokens several processes share, against the same rows whole. Run by torchrun; process 0 prints figures.

torchrun --nproc-per-node 4 -m tests.distributed.sequences
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch, collate
from rlhf_cli.errors import RlhfError
from rlhf_cli.models import processes, sequence, traffic
from rlhf_cli.models.build import with_head
from rlhf_cli.models.checks import allows_packing
from rlhf_cli.models.roles import Role
from rlhf_cli.runs.place import place
from tests.models.worlds import kinds, lora_role, make_base

ARCHITECTURES = {2: ("llama-tied", "gemma3-window-32", "gpt2", "mixtral"), 4: ("llama", "mistral-window-8")}
"""By the number of processes that share a row; of two key heads, four processes each need a copy of one."""


def said(role: Role, batch: Batch, way: str) -> Tensor:
    """What is read of the tokens: (T,), (T, K) or (N,)."""
    if way == "score":
        return role.score(batch)
    if way == "values":
        return role.values_around(batch)
    if way == "known":
        return role.logp(batch, statistics="entropy", upstream=-0.5).logp
    found = role.logp(batch, 1.3 if way == "bonus" else 1.0, statistics=way)  # type: ignore[arg-type]
    columns = [x for x in found if len(x) == len(found.logp)]
    return torch.stack(columns, dim=1)


def numbers(role: Role, batch: Batch, way: str) -> list[Tensor]:
    """What is read, and the gradient of its weighted sum by every parameter, added up as a step does."""
    with role.active(train=True):
        out = said(role, batch, way)
        weight = torch.tensor(-0.5) if way == "known" else torch.linspace(-1, 2, out.numel()).view(out.shape)
        role.backward((out * weight).sum())
    trained = [p for _, p in role.parameters]
    if batch.dealt:
        for p in trained:  # several groups computed the same here, and in a step others
            p.grad = None if p.grad is None else p.grad / sequence.groups()
        processes.add(trained, "adding up")
    found = [out.detach(), *(torch.zeros(1) if p.grad is None else p.grad.clone() for p in trained)]
    for p in trained:
        p.grad = None
    return found


def gap(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest, relative to 1 + the largest number."""
    both = zip(one, other, strict=True)
    return max(float((a.double() - b.double()).abs().max() / (1.0 + a.abs().max())) for a, b in both)


def roles(name: str) -> dict[str, Role]:
    """Who is asked, by the way."""
    full, lora, judge = make_base(name), make_base(name), make_base(name)
    for base in (full, lora, judge):
        assert allows_packing(base)
        base.packed = True
    adapted = lora_role(lora, "policy")
    policy = Role("policy", full, trained=True)
    ways = dict.fromkeys(("none", "entropy", "bonus", "usual", "collision", "known"), policy)
    scorer = with_head(lora_role(judge, "reward"), "reward")
    return {**ways, "lora": adapted, "score": scorer, "values": scorer}


def compared(name: str) -> dict[str, float]:
    found = {}
    for way, role in roles(name).items():
        batch = collate(kinds()["pairs"] + kinds()["pairs"][:1], packed=True)
        kind = "none" if way == "lora" else way
        whole = numbers(role, batch, kind)
        found[way] = gap(whole, numbers(role, replace(batch, dealt=True), kind))
    return found


def exchanged() -> dict[str, float]:
    """Bytes of one forward, and what the formula says."""
    base = make_base("llama")
    base.packed = allows_packing(base)
    role, batch = Role("policy", base), replace(collate(kinds()["pairs"], packed=True), dealt=True)
    traffic.take()
    with role.active():
        role.hidden(batch)
    config, size = base.model.config, sequence.size()
    depth = config.hidden_size // config.num_attention_heads
    share = config.num_key_value_heads if config.num_key_value_heads % size == 0 else config.num_attention_heads
    mine = sequence.parts(batch.ids.shape[1])
    here = mine[sequence.member()]
    forth = here * (config.num_attention_heads + 2 * share) * depth * (size - 1) / size
    back = (sum(mine) - here) * config.num_attention_heads / size * depth
    layers = config.num_hidden_layers
    return {"told": traffic.take()["distributed/exchanged_bytes"], "formula": 4 * layers * (forth + back)}


def refusal(wanted: int) -> str:
    try:
        sequence.ask(wanted)
    except RlhfError as error:
        return str(error)
    return "accepted"


def main() -> None:
    torch.set_num_threads(1)
    processes.start(place(), 60.0)
    told: dict[str, Any] = {"refused": refusal(3)}
    for size in (2, 4):
        sequence.ask(size)
        told[f"by {size}"] = {name: compared(name) for name in ARCHITECTURES[size]}
        told[f"traffic {size}"] = exchanged()
    if processes.rank() == 0:
        print("FOUND " + json.dumps(told), flush=True)
    processes.stop()


if __name__ == "__main__":
    main()
