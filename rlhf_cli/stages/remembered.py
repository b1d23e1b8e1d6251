"""The reference's numbers of each example: asked for once, kept in checkpoints, shared between runs.

They are computed in the policy's own micro-batch, so that the two agree to the bit at step 0; then they may depend, in
the last bit, on what else was in that micro-batch. So an entry of the cache belongs to everything that decides this:
the tokens and their order, the weights, how batches are cut, the arithmetic. A run that finds its numbers there goes on
exactly like one that computes them.

n examples of a split, W completions of an example, C numbers of a completion.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.data.loader import Loader
from rlhf_cli.data.prepare import Prepared
from rlhf_cli.data.tokens import Sample
from rlhf_cli.models import processes, sequence
from rlhf_cli.models.base import Text
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.model_path import fingerprint
from rlhf_cli.runs.cache import Entry, Store, key_of, open_store
from rlhf_cli.runs.provenance import versions
from rlhf_cli.stages.strangers import NOBODY, Strangers
from rlhf_cli.train.engine import Engine

KIND = "reference"
NO, SHARED, OWN = 0, 1, 2
"""What is known of a row: nothing; what any run under the same key computes; what only this run goes by, after a change
of its micro-batches."""
NO_KEY = "0" * 64
"""The key of numbers that are not shared."""
NO_EFFECT = {
    "model": {"name_or_path", "revision", "chat_template", "gradient_checkpointing"},
    "lora": {"r", "alpha", "dropout", "use_rslora"},
}
"""Settings that the numbers of a frozen model do not depend on, or that its fingerprint and the tokens stand for."""


@dataclass(frozen=True)
class Memory:
    """The reference's numbers of a split."""

    logp: Tensor  # (n, W, C)
    known: Tensor  # (n,) uint8
    origin: Tensor  # (32,) uint8, the key under which the shared rows were computed
    wanted: Tensor  # (n,) bool, rows that this run will ask for
    key: str
    budget: int
    """Tokens of a micro-batch under the key."""
    store: Store | None
    found: Entry | None
    """What the cache holds."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"logp": self.logp, "known": self.known, "origin": self.origin}

    def knows(self, rows: Tensor) -> bool:
        """Whether nothing need be asked for these rows."""
        return bool((self.known[rows] != NO).all())

    @property
    def complete(self) -> bool:
        """Whether the run will ask for nothing any more."""
        return bool((self.known[self.wanted] != NO).all())

    def keep(self, rows: Tensor, fresh: Tensor, budget: int) -> None:
        """Numbers (rows, W, C) asked for in micro-batches of `budget` tokens; those that are known already stay."""
        new = self.known[rows] == NO
        self.logp[rows[new]] = fresh[new]
        self.known[rows[new]] = SHARED if budget == self.budget else OWN

    def in_cache(self) -> Tensor:
        """Rows that the cache knows: (n,) bool."""
        return torch.zeros_like(self.wanted) if self.found is None else _tensor(self.found, "known") != NO

    def cached(self, row: int) -> Tensor:
        """What the cache says of a row, its first number of each completion: (W,)."""
        assert self.found is not None
        return _tensor(self.found, "logp")[row, :, 0]

    def recall(self) -> None:
        """After a checkpoint was read, if there is one: what it does not know comes from the cache."""
        own = torch.frombuffer(bytearray.fromhex(self.key), dtype=torch.uint8)
        if not torch.equal(self.origin, own):
            self.known[self.known == SHARED] = OWN
            self.origin.copy_(own)
        rows = self.in_cache() & (self.known == NO)
        if self.found is not None:
            self.logp[rows] = _tensor(self.found, "logp")[rows]
            self.known[rows] = SHARED

    def share(self, notes: dict[str, str]) -> None:
        """Put into the cache what it does not hold yet."""
        if self.store is None:
            return
        rows = (self.known == SHARED) & torch.isfinite(self.logp).flatten(1).all(1)
        there = self.store.read(KIND, self.key, _layout(self.logp))
        numbers = torch.where(rows[:, None, None], self.logp, torch.zeros_like(self.logp))
        if there is not None:
            older = (_tensor(there, "known") != NO) & ~rows
            if not bool((rows & (_tensor(there, "known") == NO)).any()):
                return
            numbers[older] = _tensor(there, "logp")[older]
            rows |= older
        if bool(rows.any()):
            arrays = {"logp": numbers.numpy(), "known": rows.to(torch.uint8).numpy()}
            self.store.write(KIND, self.key, arrays, notes)


@dataclass
class Reference:
    """The frozen model a policy is compared with, and what is known of it."""

    engine: Engine
    memory: dict[str, Memory]
    """By split; empty when no objective needs a reference."""
    strangers: Mapping[str, Strangers]
    """By split; empty when no objective compares with them."""
    role: Role | None = None
    """None as well when nothing is left to ask. Whoever holds it besides keeps it in memory."""
    fresh: dict[str, list[int]] = field(default_factory=dict)
    """By split: rows that this process asked for since the last `exchange`."""

    def recall(self) -> None:
        """Once a checkpoint was read, if there is one: what it and the cache know need not be asked for."""
        for _, memory in sorted(self.memory.items()):
            memory.recall()
            if processes.count() > 1:  # machines may have caches of their own: the first one's counts
                for own in (memory.known, memory.logp):
                    every = processes.gather_rows(own if processes.rank() == 0 else None, "recalling the reference")
                    own.copy_(every[0])
        self._let_go()

    def keep(self, split: str, rows: Tensor, fresh: Tensor) -> None:
        """Remember numbers (rows, W, C) that were just asked for."""
        self.memory[split].keep(rows, fresh.float().cpu(), self.engine.budget)
        if processes.count() > 1:
            self.fresh.setdefault(split, []).extend(rows.tolist())
        self._let_go()

    def exchange(self) -> None:
        """What one of several processes asked for, all of them remember."""
        if processes.count() == 1 or not self.memory:
            return
        doing = "exchanging the reference's numbers"
        for split in sorted(self.memory):
            memory, fresh = self.memory[split], self.fresh.pop(split, [])
            places = processes.gather(fresh, doing)
            if any(places):
                parts = processes.gather_rows(memory.logp[torch.tensor(fresh)] if fresh else None, doing)
                for rows, part in zip(places, parts, strict=True):
                    if rows:
                        memory.keep(torch.tensor(rows), part, self.engine.budget)
        self._let_go()

    def share(self) -> None:
        """Leave what is known to later runs."""
        for memory in self.memory.values() if processes.rank() == 0 else ():
            memory.share({"run": str(self.engine.run.path), "packed": str(self.engine.packed)})

    def _let_go(self) -> None:
        """Free the model once nothing will be asked of it."""
        if self.role is not None and all(memory.complete for memory in self.memory.values()):
            self.role = None
            gc.collect()


def open_memory(
    recipe: Any, engine: Engine, policy: Role, text: Text, named: Text | None, data: Prepared, loader: Loader,
    kind: str, common: bool, strangers: Mapping[str, Strangers],
) -> dict[str, Memory]:  # fmt: skip
    """Room for the reference's numbers of each split, and of its strangers; a checkpoint keeps those that are known.

    kind: of the examples; common: whether an objective needs a second number of each completion.
    """
    weights = _weights(policy, text, named)
    store = None if recipe.reference_cache == "off" or weights is None else open_store(engine.display.warn)
    about = _about(recipe, engine, policy) | {"weights": weights, "kind": kind, "common": common}
    order = [list(loader.weights), loader.batch_size, loader.seed, hashlib.sha256(loader.source.tobytes()).hexdigest()]
    splits = {
        "train": (data.train, order, _visited(loader, engine.total_steps)),
        "eval": (data.eval or [], None, torch.ones(len(data.eval or []), dtype=torch.bool)),
    }
    shape = (1 if kind == "verdict" else 2, 2 if common else 1)
    memory = {}
    for split, (samples, dealt, wanted) in splits.items():
        if not samples:
            continue
        content = {} if store is None else {"data": digest(samples), "order": dealt}
        parts: dict[str, tuple[dict[str, Any], Tensor]] = {split: ({}, wanted)}
        if split in strangers:
            has = torch.from_numpy(strangers[split].partner != NOBODY)
            parts[strangers_of(split)] = {"strangers": strangers[split].max_length}, wanted & has
        for name, (more, asked) in parts.items():
            key = NO_KEY if store is None else key_of(**about, **content, **more)
            logp = torch.zeros(len(samples), *(shape if name == split else (1, 1)))
            found = None if store is None else store.read(KIND, key, _layout(logp))
            known, origin = torch.zeros(len(samples), dtype=torch.uint8), torch.zeros(32, dtype=torch.uint8)
            memory[name] = Memory(logp, known, origin, asked, key, engine.budget, store, found)
            engine.kept_tensors[f"reference-{name}"] = memory[name].tensors()
    return memory


def strangers_of(split: str) -> str:
    """The name of what is remembered of a split's strangers."""
    return f"{split}-strangers"


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of the tokens of some samples, in their order, and of which of them are scored."""
    total = hashlib.sha256()
    for sample in samples:
        sizes = [len(sample.prompt), *(len(c.ids) for c in sample.completions)]
        total.update(np.array([len(sizes), *sizes], dtype=np.int64).tobytes() + sample.prompt.tobytes())
        for completion in sample.completions:
            total.update(completion.ids.tobytes() + completion.scored.tobytes())
    return total.hexdigest()


def _about(recipe: Any, engine: Engine, policy: Role) -> dict[str, Any]:
    """What decides the numbers of a model besides its weights and tokens."""
    device = policy.base.device
    cuda = device.type == "cuda"
    return {
        "model": recipe.model.model_dump(mode="json", exclude=NO_EFFECT["model"]),
        "lora": recipe.lora and recipe.lora.model_dump(mode="json", exclude=NO_EFFECT["lora"]),
        "dtype": str(policy.base.dtype),
        "packed": engine.packed,
        "budget": engine.budget,
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": 0 if cuda else torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        **(
            {"processes": processes.count(), "shard": policy.base.shards, "sequence": sequence.size()}
            if processes.count() > 1
            else {}
        ),
    }


def _weights(policy: Role, text: Text, named: Text | None) -> list[str] | None:
    """Fingerprints of the reference's weights and of the policy's base, which decides how it is laid out; None where
    nobody can say which weights a hub name stands for."""
    whose = text if named is None else named
    found = [policy.base.fingerprint]
    if named is not None:
        folder, commit = Path(named.source), getattr(named.config, "_commit_hash", None)
        found.append(fingerprint(folder) if folder.is_dir() else f"hub:{named.source}@{commit or 'unknown'}")
    if whose.path.kind == "adapter":
        found.append(fingerprint(Path(str(whose.path.weights))))
    return None if any(name.endswith("@unknown") for name in found) else found


def _visited(loader: Loader, steps: int) -> Tensor:
    """Which rows the first steps of a run deal: (n,) bool."""
    dealt = Loader(loader.source, loader.weights, loader.batch_size, loader.seed)
    seen = np.zeros(len(loader.source), dtype=bool)
    for _ in range(steps):
        seen[dealt.next()] = True
        if seen.all():
            break
    return torch.from_numpy(seen)


def _layout(logp: Tensor) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    return {"logp": ("F32", tuple(logp.shape)), "known": ("U8", (len(logp),))}


def _tensor(entry: Entry, name: str) -> Tensor:
    return torch.from_numpy(entry.arrays[name].copy())
