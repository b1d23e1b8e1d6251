"""Where a text is cut for fine-grained rewards: characters only, no tokenizer, no torch.

The segments of a text are half-open spans that follow one another and cover it: white space belongs to the segment
before it, at the very beginning to the first.
"""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

By: TypeAlias = Literal["sub_sentence", "sentence", "answer"]
Span: TypeAlias = tuple[int, int]

_CLOSING = r"""["'”’»)\]]*"""
_LINE = r"\s*\n\s*"
_CUTS = {
    "sub_sentence": re.compile(rf"(?:[,;:.!?]+{_CLOSING}(?:\s+|\Z)|[，；：。！？]+{_CLOSING}\s*|{_LINE})"),
    "sentence": re.compile(rf"(?:[.!?]+{_CLOSING}(?:\s+|\Z)|[。！？]+{_CLOSING}\s*|{_LINE})"),
}
_TITLES = "Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|cf|approx|Fig|Eq|Sec|Vol|pp"
_ABBREVIATION = re.compile(rf"""(?:^|[\s(\["'“‘])(?:[A-Z]|{_TITLES}|(?:[A-Za-z]\.)+[A-Za-z])\Z""")
_NUMBERED = re.compile(r"(?:^|\n)[ \t]*\d{1,3}\Z")


def segments(text: str, by: By) -> list[Span]:
    """Spans of a text's sub-sentences (cut at , ; : . ! ? and line ends), its sentences, or the whole answer.

    Marks inside a word or number do not cut (3.5, 1,000, a.b), nor does the full stop of an abbreviation, an initial or
    the number of a list item. No segment is empty; an empty text has none.
    """
    if not text:
        return []
    ends = [] if by == "answer" else [m.end() for m in _CUTS[by].finditer(text) if not _joins(text, m)]
    spans: list[Span] = []
    start = 0
    for end in (*ends, len(text)):
        if text[start:end].strip():
            spans.append((start, end))
            start = end
    return spans or [(0, len(text))]


def _joins(text: str, cut: re.Match[str]) -> bool:
    """Whether the mark is a full stop that belongs to what stands before it."""
    if not cut.group().startswith(".") or "\n" in cut.group():
        return False
    place = max(0, cut.start() - 20), cut.start()
    return bool(_ABBREVIATION.search(text, *place) or _NUMBERED.search(text, *place))


def labelled(spans: list[Span], errors: list[Span]) -> list[int]:
    """-1 for each span that shares at least one character with an error, else 1."""
    return [-1 if any(max(s, low) < min(e, high) for low, high in errors) else 1 for s, e in spans]
