"""Stop strings: found in the text of a completion, wherever the borders of its tokens fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_cli.data.template import Template

REPLACEMENT = "\ufffd"  # what a part of a character decodes to


@dataclass(frozen=True)
class TextStops:
    """Strings that end a completion with the token that completes one of them; the rest of that token's text stays.

    The text is what `Template.decode` shows: special tokens are no part of it, nor is the prompt.
    """

    template: Template
    strings: tuple[str, ...]
    _may_end: dict[int, bool] = field(default_factory=dict, repr=False, compare=False)

    def ends(self, prompt: np.ndarray, ids: Sequence[int]) -> bool:
        """Whether the last of these tokens of a completion completes a stop string."""
        if not self.may_end(ids[-1]):
            return False
        # Every token brings at least a byte; some more, for special tokens and for a character cut at the start.
        reach = max(len(s.encode()) for s in self.strings) + 8
        tail = list(ids[-reach:])
        after = prompt if len(ids) <= reach else ()
        text = self.template.decode(tail, after=after)
        before = self.template.decode(tail[:-1], after=after)
        found = (text[: at + len(s)] for s in self.strings if (at := text.rfind(s)) >= 0)
        return any(not before.startswith(part) for part in found)

    def may_end(self, token: int) -> bool:
        """Whether this token can hold the last character of a stop string, or a byte of it."""
        if token not in self._may_end:
            text = self.template.decode([token, token])  # twice: some tokenizers drop the first space of a text
            self._may_end[token] = REPLACEMENT in text or any(s[-1] in text for s in self.strings)
        return self._may_end[token]


def split(stops: Sequence[str], template: Template) -> tuple[tuple[int, ...], TextStops | None]:
    """Strings that spell a token added to the vocabulary, as its id; the others as text, None without any."""
    whole, added = template.encoder.whole, template.encoder.added
    ids = {s: whole.token_to_id(s) for s in dict.fromkeys(stops)}
    strings = tuple(s for s, i in ids.items() if i not in added)
    return tuple(i for i in ids.values() if i in added), TextStops(template, strings) if strings else None
