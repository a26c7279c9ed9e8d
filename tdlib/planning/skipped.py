"""What stays dense: why, and with what share of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Sizes = Mapping[str, tuple[int, int]]  # layer → (params, macs)


@dataclass(frozen=True)
class Group:
    """Layers that stay dense for one reason, and (params, macs) of all of them."""

    reason: str
    names: tuple[str, ...]
    size: tuple[int, int]


def groups(skipped: Mapping[str, str], costs: Sizes, by: str) -> list[Group]:
    """The layers by reason, first what is most of the network in the unit `by`."""
    found = []
    for reason in dict.fromkeys(skipped.values()):
        names = tuple(name for name, why in skipped.items() if why == reason)
        params, macs = (sum(costs[n][k] for n in names if n in costs) for k in (0, 1))
        found.append(Group(reason, names, (params, macs)))
    return sorted(found, key=lambda group: -group.size[by == "macs"])


def summary(skipped: Mapping[str, str], costs: Sizes, by: str, planned: int, most: int = 4) -> str:
    """How many layers of all (`planned` of them do not stay dense) and the first reasons; empty where there
    are none."""
    if not skipped:
        return ""
    found = groups(skipped, costs, by)
    reasons = "; ".join(f"{len(group.names)}× {group.reason!r}" for group in found[:most])
    more = f"; and {len(found) - most} more reasons" if len(found) > most else ""
    return f"{len(skipped)} of {len(skipped) + planned} layers stay dense, {reasons}{more}"


def percent(part: float, whole: float) -> str:
    """A share for people."""
    return f"{100 * part / max(1, whole):.1f} %"
