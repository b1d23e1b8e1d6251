"""Roles: policy, reference, reward and critic as views of base weights, through adapters and heads.

The one place that switches adapters. Two traps of a shared base are closed here: switching clears requires_grad, so the
flags are restored at each switch; and under activation checkpointing the backward pass recomputes with whatever adapter
is on, so a role whose graph is open cannot be left before its backward pass has run.

R rows, L slots, T scored tokens, N sequences, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.data.batch import Batch
from rlhf_cli.models import processes, sequence, sharding
from rlhf_cli.models.adapters import adapter_parameters
from rlhf_cli.models.attention import forward_arguments
from rlhf_cli.models.base import Base
from rlhf_cli.objectives.logprob import Statistics, TokenLogp, token_logits, token_logp

SAID: dict[Statistics, tuple[str, ...]] = {
    "none": ("logp",), "entropy": ("logp", "entropy"), "bonus": ("logp", "entropy"),
    "usual": ("logp", "entropy", "mean"), "collision": ("logp", "collision"),
}  # fmt: skip
"""What a `TokenLogp` holds, by the statistics asked for."""


class RoleError(AssertionError):
    """Two roles of one base were mixed. Our bug, never the user's."""


@dataclass(eq=False)
class Role:
    """One model of the algorithm."""

    name: str
    base: Base
    adapter: str | None = None
    """Its adapter; None: the base alone, adapters off."""
    head: nn.Linear | None = None
    """A head (float32) for scores, values or classes."""
    trained: bool = False
    parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    """What an optimiser may change, by name. Explicit, never read off requires_grad."""
    value_head: nn.Linear | None = None
    """A head (float32) for values beside the language head: the critic on the policy's own trunk."""

    def __post_init__(self) -> None:
        if self.trained:
            if self.adapter is not None:
                self.parameters = adapter_parameters(self.base, self.adapter)
            else:
                unused = set() if self.head is None else {id(p) for p in _other_heads(self.base)}
                self.parameters = [(n, p) for n, p in self.base.model.named_parameters() if id(p) not in unused]
            for name, head in (("head", self.head), ("value_head", self.value_head)):
                if head is not None:
                    self.parameters += [(f"{name}.{n}", p) for n, p in head.named_parameters()]

    @contextmanager
    def active(self, *, train: bool = False) -> Iterator[None]:
        """This role is the one that computes. With `train`, its parameters take gradients and dropout is on.

        Raises RoleError when another role of this base still owes its backward pass.
        """
        owing = self.base.open_graph
        if owing is not None and owing is not self:
            raise RoleError(f"{self.name} cannot start: the backward pass of {owing.name} is still to come")
        self._switch(train and self.trained)
        if train and self.base.shards and owing is None:
            sharding.start_pass(self.base)
        try:
            with torch.set_grad_enabled(train and self.trained), self.base.autocast():
                yield
        finally:
            self.base.model.eval()

    def _switch(self, train: bool) -> None:
        base = self.base
        if base.peft is not None and self.adapter != base.active:
            if self.adapter is None:
                tuner(base).disable_adapter_layers()
            else:
                tuner(base).enable_adapter_layers()
                base.peft.set_adapter(self.adapter)
            base.active = self.adapter
        elif base.peft is not None and self.adapter is None:
            tuner(base).disable_adapter_layers()
        own = {id(p) for _, p in self.parameters} if train else set()
        for parameter in base.model.parameters():
            wanted = id(parameter) in own
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
        base.model.train(train)

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states: (R L, H); of a batch that is dealt out those of this process. Call within `active`."""
        if batch.packed and not self.base.packed:
            raise RoleError("a packed batch for a base that cannot take it")
        if self.base.shards and processes.met() and processes.count() == 1:
            raise RoleError(f"{self.name} is held in parts by several processes, and one of them asks it alone")
        states = self.base.model.base_model(
            **forward_arguments(batch, one_kernel=self.base.flex)
        ).last_hidden_state  # (R, L, H)
        if torch.is_grad_enabled():
            self.base.open_graph = self
        return states.reshape(-1, states.shape[-1])

    def read(
        self, hidden: Tensor, batch: Batch, at: Tensor, function: Callable[[Tensor, Tensor | slice], Tensor]
    ) -> Tensor:
        """function(states (T, H), which of the places) of the hidden states at some flat places of a batch (T,), in
        their order, wherever they lie."""
        if not batch.dealt:
            return function(hidden[at], slice(None))
        return sequence.read(hidden, at, batch.ids.shape[1], function)

    def logp(
        self,
        batch: Batch,
        temperature: float = 1.0,
        *,
        statistics: Statistics = "usual",
        upstream: float | None = None,
    ) -> TokenLogp:
        """Log-probability, and the statistics asked for, of each scored token: (T,), float32. upstream: the gradient
        that each will be given, where it is known beforehand."""
        return self._logp(self.hidden(batch), batch, temperature, statistics, upstream)

    def _logp(
        self,
        hidden: Tensor,
        batch: Batch,
        temperature: float,
        statistics: Statistics,
        upstream: float | None = None,
    ) -> TokenLogp:
        ids = batch.ids.view(-1)[batch.targets]

        def said(states: Tensor, which: Tensor | slice) -> TokenLogp:
            return token_logp(
                states, self.base.head(), ids[which], temperature,
                vocabulary=self.base.vocabulary, statistics=statistics, upstream=upstream,
            )  # fmt: skip

        if not batch.dealt:
            return said(hidden[batch.predictors], slice(None))
        names = SAID[statistics]

        def columns(states: Tensor, which: Tensor | slice) -> Tensor:
            found = said(states, which)
            return torch.stack([getattr(found, name) for name in names], dim=1)

        rows = self.read(hidden, batch, batch.predictors, columns)
        nothing = rows[:0, 0]
        found = dict(zip(names, rows.unbind(1), strict=True))
        return TokenLogp(*(found.get(name, nothing) for name in TokenLogp._fields))

    def values(self, batch: Batch) -> Tensor:
        """Value of the state before each scored token: (T,), float32."""
        return self._scalar(self.hidden(batch), batch, batch.predictors)

    def values_around(self, batch: Batch) -> Tensor:
        """Values of the states before and after each scored token: (T, 2), float32."""
        hidden = self.hidden(batch)
        return torch.stack([self._scalar(hidden, batch, at) for at in (batch.predictors, batch.targets)], dim=1)

    def logp_and_values(
        self,
        batch: Batch,
        temperature: float,
        *,
        statistics: Statistics = "usual",
        detach: bool = False,
        around: bool = False,
    ) -> tuple[TokenLogp, Tensor]:
        """`logp` and the K values of the own value head, from one forward: of the state before each scored token
        (T, K) or, with `around`, of those before and after it (T, 2 K). detach: no gradient of the values reaches the
        trunk."""
        if self.value_head is None:
            raise RoleError(f"{self.name} has no value head")
        hidden = self.hidden(batch)
        seen = hidden.detach() if detach else hidden
        places = (batch.predictors, batch.targets) if around else (batch.predictors,)
        values = torch.cat([self._through(self.value_head, seen, batch, at) for at in places], dim=1)
        return self._logp(hidden, batch, temperature, statistics), values

    def values_of_still_trunk(self, batch: Batch) -> Tensor:
        """The K values of the own value head at each scored token (T, K), the trunk run without gradient."""
        if self.value_head is None:
            raise RoleError(f"{self.name} has no value head")
        with torch.no_grad():
            hidden = self.hidden(batch)
        if torch.is_grad_enabled():
            self.base.open_graph = self
        return self._through(self.value_head, hidden, batch, batch.predictors)

    def score(self, batch: Batch) -> Tensor:
        """Score of each sequence, read at its last token: (N,), float32."""
        return self._scalar(self.hidden(batch), batch, batch.last)

    def classes(self, batch: Batch) -> Tensor:
        """What the head says at each scored token: (T, C), float32."""
        return self._head(self.hidden(batch), batch, batch.targets)

    def followed_by(self, batch: Batch, tokens: Sequence[int]) -> Tensor:
        """Logits of these tokens as what comes right after each scored token: (T, len(tokens)), float32."""
        wanted, base = torch.tensor(list(tokens), device=batch.ids.device), self.base
        return self.read(self.hidden(batch), batch, batch.targets,
                         lambda states, _: token_logits(states, base.logits, wanted, base.vocabulary))  # fmt: skip

    def _scalar(self, hidden: Tensor, batch: Batch, at: Tensor) -> Tensor:
        return self._head(hidden, batch, at).squeeze(-1)

    def _head(self, hidden: Tensor, batch: Batch, at: Tensor) -> Tensor:
        if self.head is None:
            raise RoleError(f"{self.name} has no head of its own")
        return self._through(self.head, hidden, batch, at)

    def _through(self, head: nn.Linear, hidden: Tensor, batch: Batch, at: Tensor) -> Tensor:
        with torch.autocast(self.base.device.type, enabled=False):
            return self.read(hidden, batch, at, lambda states, _: head(states.float()))

    def backward(self, loss: Tensor) -> None:
        """loss.backward(), while this role is active; afterwards other roles may start."""
        if self.base.open_graph is not self:
            raise RoleError(f"{self.name} has no graph")
        loss.backward()
        self.base.open_graph = None

    def abandon(self) -> None:
        """Give up a graph whose backward pass will not come (out of memory)."""
        if self.base.open_graph is self:
            self.base.open_graph = None

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by name, as a checkpoint keeps them."""
        return {name: parameter.detach() for name, parameter in self.parameters}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        own = dict(self.parameters)
        if set(own) != set(tensors):
            raise RoleError(f"{self.name}: other tensors than its own: {sorted(set(own) ^ set(tensors))[:3]}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                sharding.fill(own[name], tensor)


def tuner(base: Base) -> Any:
    """peft's object that switches adapter layers."""
    assert base.peft is not None
    return base.peft.base_model


def _other_heads(base: Base) -> list[nn.Parameter]:
    """Parameters that a role with a head of its own does not use: an untied language head, a classifier's score."""
    heads = [base.model.get_output_embeddings(), getattr(base.model, "score", None)]
    embedding = base.model.get_input_embeddings().weight
    return [p for head in heads if isinstance(head, nn.Module) for p in head.parameters() if p is not embedding]


def disable_dropout(base: Base) -> None:
    """Every dropout of the base and its adapters off: preference and PPO losses compare a model with itself."""
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        for module in base.model.modules():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
