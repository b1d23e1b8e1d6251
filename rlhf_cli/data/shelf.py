"""Tokenised samples that outlive a run: under which name they are kept, and as which arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from rlhf_cli.data.samples import LAYOUT as SAMPLES
from rlhf_cli.data.samples import Places, Samples
from rlhf_cli.data.tokenizing import Tokenized

LAYOUT = {**SAMPLES, "kept": ("I64", (None,)), "dropped": ("I64", (None,)), "reason": ("I32", (None,)),
          "refused": ("BOOL", (None,))}  # fmt: skip
"""The arrays of an entry: those of the samples, and the indices of examples that are samples, and that are not, these
with whether the chat template refused them."""


class Shelf(Protocol):
    """Where they are kept."""

    def find(self, about: Mapping[str, Any]) -> tuple[Mapping[str, np.ndarray], Mapping[str, str]] | None:
        """The arrays and notes that were kept under `about`; None when there are none that can be used."""

    def keep(self, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> None:
        """Keep these."""

    def used(self, about: Mapping[str, Any]) -> None:
        """Say that what was found is still wanted."""


def pack(made: Tokenized) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """As arrays and notes. Where the samples came from is not among them."""
    left = made.dropped + made.refused
    reasons = {reason: number for number, reason in enumerate(dict.fromkeys(reason for _, reason in left))}
    arrays = made.samples.arrays | {
        "kept": made.kept,
        "dropped": np.array([index for index, _ in left], dtype=np.int64),
        "reason": np.array([reasons[reason] for _, reason in left], dtype=np.int32),
        "refused": np.arange(len(left)) >= len(made.dropped),
    }
    counts = {"shortened": made.shortened, "labels_cut": made.labels_cut}
    return arrays, {"notes": json.dumps(counts | {"names": made.samples.names, "reasons": list(reasons)})}


def unpack(arrays: Mapping[str, np.ndarray], notes: Mapping[str, str], places: Sequence[str]) -> Tokenized:
    """What was packed; `places` are those of all examples."""
    found = json.loads(notes["notes"])
    kept = np.array(arrays["kept"])
    left = [(int(i), found["reasons"][r]) for i, r in zip(arrays["dropped"], arrays["reason"], strict=True)]
    dropped = len(left) - int(arrays["refused"].sum())
    return Tokenized(
        samples=Samples({name: arrays[name] for name in SAMPLES}, found["names"], Places(places[i] for i in kept)),
        kept=kept,
        dropped=left[:dropped],
        refused=left[dropped:],
        shortened=found["shortened"],
        labels_cut=found["labels_cut"],
    )
