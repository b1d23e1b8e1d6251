"""`rlhf chat`: talk to a run; two runs answer side by side. Lines on stdin, answers on stdout as they are written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rlhf_cli.data.examples import Message
from rlhf_cli.errors import DataError, ModelError
from rlhf_cli.models.base import Base, Text, load_text
from rlhf_cli.models.build import frozen_role, quantization_of
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.model import ModelSettings, Quantization
from rlhf_cli.rollouts.forward import Forward
from rlhf_cli.rollouts.generate import mixed
from rlhf_cli.rollouts.rows import Rows
from rlhf_cli.rollouts.sampling import Sampling

COMMANDS = "/again another answer, /new from the start, /quit (or end of input) to leave"
BARE = "its tokenizer has no chat template: it goes on writing after your lines, as they stand"


@dataclass
class Speaker:
    """A model in a conversation."""

    name: str
    text: Text
    role: Role
    said: list[Message] = field(default_factory=list)

    def answer(self, sampling: Sampling, seed: int) -> Iterator[str]:
        """The answer to what was said so far, piece by piece; it is added to the conversation at its end. Raises
        DataError and ModelError: no template, no room in the context."""
        template = self.text.template
        ids = template.prompt_ids(tuple(self.said)) if template.chat is not None else template.prompt_ids(self._plain())
        context = getattr(self.text.config.get_text_config(), "max_position_embeddings", None) or 10**9
        room = min(sampling.max_new_tokens, context - len(ids))
        if room < 1:
            raise DataError(f"the conversation has {len(ids)} tokens, the model a context of {context}", self.name,
                            "/new starts again")  # fmt: skip
        prompt, whole = np.array(ids, dtype=np.int32), ""
        for token_ids in tokens(self.role, prompt, template.stop_ids, sampling, room, seed):
            text = template.decode(token_ids, after=prompt)
            if not text.endswith("�"):  # half a character
                yield text[len(whole) :]
                whole = text
        self.said.append(Message("assistant", whole))

    def _plain(self) -> str:
        return "".join(message.content for message in self.said)


@torch.no_grad()
def tokens(
    role: Role, prompt: np.ndarray, stop_ids: Sequence[int], sampling: Sampling, room: int, seed: int
) -> Iterator[np.ndarray]:
    """The ids of an answer so far, after every token; drawn as a rollout with this seed draws its first completion."""
    base = role.base
    rows = Rows([prompt], [0], stop_ids, sampling, seed, base.device)
    ids = torch.from_numpy(prompt[None].astype(np.int64)).to(base.device)
    mask = torch.ones(1, len(prompt) + sampling.max_new_tokens, dtype=torch.int64, device=base.device)
    position = torch.arange(len(prompt), device=base.device)[None]
    drawn: list[int] = []
    with role.active():
        forward = Forward(base, mask)
        for _ in range(room):
            token = rows.draw(base.logits(forward(ids, position)), rows.everyone)
            drawn.append(int(token))
            if rows.left == 0:
                drawn = drawn[:-1] if drawn[-1] in stop_ids else drawn
                yield np.array(drawn, dtype=np.int32)
                return
            yield np.array(drawn, dtype=np.int32)
            ids, position = forward.next(ids, token[:, None]), forward.next(position, position[:, -1:] + 1)


def open_speakers(names: Sequence[str], quantization: Quantization | None) -> list[Speaker]:
    """The models, on one base where they share it; quantization None: as each was trained. Raises RecipeError and
    ModelError."""
    shared: dict[Quantization, Base] = {}
    found = []
    for i, name in enumerate(names):
        text = load_text(ModelSettings(name_or_path=name))
        own = quantization_of(text) if quantization is None else quantization
        settings = ModelSettings(name_or_path=name, quantization=own)
        role = frozen_role(f"speaker-{i}", settings, text, shared.get(own))
        if role.adapter is not None:
            shared.setdefault(own, role.base)
        found.append(Speaker(name, text, role))
    return found


@dataclass
class Conversation:
    """Everyone who answers, and what was said to them."""

    speakers: Sequence[Speaker]
    sampling: Sampling
    system: str | None
    seed: int
    write: Callable[[str], Any]
    turn: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """As if nothing had been said."""
        for speaker in self.speakers:
            speaker.said = [] if self.system is None else [Message("system", self.system)]

    def hear(self, line: str) -> bool:
        """A line of the user, or a command; False when that ends the conversation. Raises DataError and ModelError."""
        line = line.strip()
        if line in ("/quit", "/exit"):
            return False
        if line == "/new":
            self.restart()
        elif line == "/again":
            self._again()
        elif line.startswith("/"):
            self.write(f"{COMMANDS}\n")
        elif line:
            for speaker in self.speakers:
                speaker.said.append(Message("user", line))
            self._answer()
        return True

    def _again(self) -> None:
        if any(not speaker.said or speaker.said[-1].role != "assistant" for speaker in self.speakers):
            self.write("nothing was answered yet\n")
            return
        for speaker in self.speakers:
            speaker.said.pop()
        self._answer()

    def _answer(self) -> None:
        self.turn += 1
        for speaker in self.speakers:
            if len(self.speakers) > 1:
                self.write(f"[{speaker.name}]\n")
            for piece in speaker.answer(self.sampling, mixed(self.seed, self.turn)):
                self.write(piece)
            self.write("\n")


def run(
    names: Sequence[str], sampling: Sampling, system: str | None, seed: int, quantization: Quantization | None
) -> None:
    """Talk until the end of the input. Raises RlhfError."""
    if len(set(names)) < len(names):
        raise ModelError("is named twice", names[0], "name two different models")
    conversation = Conversation(open_speakers(names, quantization), sampling, system, seed, write)
    for speaker in conversation.speakers:
        if speaker.text.template.chat is None:
            print(f"{speaker.name}: {BARE}", file=sys.stderr)
    asks = sys.stdin.isatty()
    if asks:
        print(COMMANDS, file=sys.stderr)
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or not conversation.hear(line):
            return


def write(text: str) -> None:
    """A piece of an answer, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
