"""Bytes that this process hands to collectives, or sends in those of FSDP2, since it was last asked, by kind."""

from __future__ import annotations

_moved: dict[str, float] = {}


def begin() -> None:
    """Nothing yet; what every run of several processes tells of."""
    _moved.clear()
    _moved.update(gradient=0, other=0)


def add(kind: str, size: float) -> None:
    """So many bytes more of a kind."""
    _moved[kind] = _moved.get(kind, 0) + size


def take() -> dict[str, float]:
    """Metrics: the bytes of each kind since this was last asked."""
    found = {f"distributed/{kind}_bytes": float(size) for kind, size in _moved.items()}
    _moved.update(dict.fromkeys(_moved, 0))
    return found
