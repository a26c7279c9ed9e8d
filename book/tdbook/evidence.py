"""What keeps records from being evidence: runs that cannot be traced or are not of the scale asked for, that
differ where they should be one setting, or whose two sides differ in more than what is compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

#: The part of a record's settings that says only how one more figure was measured.
_MEASURES_ONLY = "epoch"


def refused(records: Sequence[Record], profile: str) -> list[str]:
    """Why some of the records, those of a run at `profile`, carry no verdict."""
    scales = dict.fromkeys(r["scale"] for r in records if r["scale"].partition(":")[0] != profile)
    wrong = {
        "is of an older schema": any(r["schema"] < 2 for r in records),
        "does not name the network that it started from": any(r.get("start") is None for r in records),
        "is not of committed code": any(r["git"] is None or r["git"]["dirty"] for r in records),
    }
    found = [f"a record {what}" for what, true in wrong.items() if true]
    return found + [f"a run of profile {profile} is not of its scale ({scale})" for scale in scales]


def mixed(records: Sequence[Record], over: str | None) -> list[str]:
    """What tells records apart that should be one setting: figures of different settings are never pooled."""
    loops = {"seed", over}
    settings = [_parameters(r, loops) | {"data": r.get("data")} | _settings(r) for r in records]
    names = dict.fromkeys(name for one in settings for name in one)
    differing = [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]
    if differing:
        return [f"its records differ in {', '.join(differing)}"]
    return ["two records of one run"] if len({run(r, over) for r in records}) < len(records) else []


def unequal(
    ours: Sequence[Record],
    theirs: Sequence[Record],
    seeds: Iterable[Any],
    *,
    compared: Iterable[str],
    over: str | None,
    equal: Sequence[str] = (),
) -> list[str]:
    """What differs though both sides, each of one setting, must share it: at these seeds the starting
    network, the data and the metrics `equal` (what neither has is not shared), and all parameters and the
    settings that both have. compared: those that may differ, as the claim says."""
    sides = [{run(r, over): r for r in records} for records in (ours, theirs)]
    at = [key for key in sides[0] if key[0] in set(seeds)]
    found = []
    for name in ("start", "data", *equal):
        pairs = [[side[key]["metrics"].get(name, side[key].get(name)) for side in sides] for key in at]
        if any(None in pair or pair[0] != pair[1] for pair in pairs):
            found.append(name)
    own = {"seed", "method", over, *compared}
    a, b = (_parameters(records[0], own) for records in (ours, theirs))
    found += [name for name in {**a, **b} if a.get(name) != b.get(name)]
    a, b = (_settings(records[0]) for records in (ours, theirs))
    both = [name for name in a if name in b and name not in own and not name.endswith(" function")]
    found += [name for name in both if a[name] != b[name]]
    return [f"the two sides differ in {', '.join(found)}"] if found else []


def run(record: Record, over: str | None) -> tuple[Any, Any]:
    """What tells the runs of one setting apart: the seed, and the parameter that a range goes over."""
    return record["parameters"].get("seed"), record["parameters"].get(over)


def _parameters(record: Record, but: Iterable[str | None]) -> dict[str, Any]:
    return {name: value for name, value in record["parameters"].items() if name not in but}


def _settings(record: Record) -> dict[str, Any]:
    """What decided the result beside the parameters, as "part name"."""
    parts = {part: given for part, given in record.get("settings", {}).items() if part != _MEASURES_ONLY}
    return {f"{part} {name}": value for part, given in parts.items() for name, value in given.items()}
