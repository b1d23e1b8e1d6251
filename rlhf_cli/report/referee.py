"""What is to be known of a judge before its opinions are believed, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

UNHEARD = 0.1
"""A judge that says its labels less often than this has not understood what it was asked."""


def told(facts: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Lines, and whether each is a warning. What the facts do not know (nobody was asked, or by a version that did not
    look) is left out."""
    mass, bias, flips = (facts.get(key) for key in ("label_probability", "position_bias", "flips"))
    lines: list[tuple[str, bool]] = []
    if mass is not None:
        words = f"the judge says one of its labels with probability {mass:.3g}"
        deaf = (": it does not know what it is asked, and its scores are noise; look at judge.labels, "
                "judge.question and its chat template")  # fmt: skip
        lines.append((words + (deaf if mass < UNHEARD else ""), mass < UNHEARD))
    if bias is not None:
        lines.append((f"position bias {bias:+.3f} (0: none, +-0.5: it always takes one place)", False))
    if flips is not None:
        words = f"the winner changes with the order in {100 * flips:.0f} % of the matches"
        lines.append((words + (": it judges the place more than the text" if flips > 0.5 else ""), flips > 0.5))
    return lines


def warnings(found: Mapping[str, Any]) -> Iterator[str]:
    """Those of an evaluation, each with the match-up it is about."""
    for one in found.get("against", []):
        for line, bad in told(one):
            if bad:
                yield f"{one['model']} against {one['against']}: {line}"
