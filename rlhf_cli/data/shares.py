"""Work dealt out to several processes. No torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def shares(costs: Sequence[float], families: Sequence[Hashable], count: int) -> list[list[int]]:
    """Deal pieces of work out so that all processes end together: the places of each one's pieces, ascending.

    costs: of each piece; families: pieces of one family stay together as far as they are no more than a fair share
    (samples of one prompt, which is computed once). The dearest first, each to whoever has least (longest processing
    time first: Graham 1969, "Bounds on multiprocessing timing anomalies"). A function of its arguments.
    """
    fair = sum(costs) / count
    members: dict[Hashable, list[int]] = {}
    for i, family in enumerate(families):
        members.setdefault(family, []).append(i)
    units: list[tuple[float, list[int]]] = []
    for pieces in members.values():
        cost, unit = 0.0, list[int]()
        for i in pieces:
            if unit and cost + costs[i] > fair:
                units.append((cost, unit))
                cost, unit = 0.0, []
            cost, unit = cost + costs[i], [*unit, i]
        units.append((cost, unit))
    dealt: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for cost, unit in sorted(units, key=lambda entry: -entry[0]):
        least = loads.index(min(loads))
        dealt[least] += unit
        loads[least] += cost
    return [sorted(share) for share in dealt]
