"""Rules that an amendment of the ledger replaced, judged as they were: by the mean of all that matches.

They count no longer, since they pool what differs and know no interval. What they say of the records of their
time stands beside the present verdict, so that no change of a rule hides a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field

from tdbook.schema import Strict, Text


class Source(Strict):
    """Which records tested the claim: those whose parameters meet `where` (a list: any of them); `versus`
    changes some."""

    chapter: Text
    where: Annotated[dict[str, Any], Field(min_length=1)]
    versus: dict[str, Any] | None = None


class Measure(Strict):
    """How records became one number per seed.

    value: `metric`. margin: `metric` less `minus` of the same record. paired: `metric` less that of `versus`
    at equal seed and parameters `per`. spread: the range of `metric` over the parameter `over`, `versus` less
    ours.
    """

    kind: Literal["value", "margin", "paired", "spread"]
    metric: Text
    minus: Text | None = None
    per: list[Text] = Field(default_factory=list)
    over: Text | None = None


class Rule(Strict):
    """The smallest mean over seeds for either verdict; with fewer seeds it was at best "partly"."""

    reproduced: float
    partly: float
    seeds: Annotated[int, Field(ge=1)]


class Former(Strict):
    """A rule that was; claim: its wording where that was another."""

    claim: Text | None = None
    records: Source
    measure: Measure
    rule: Rule


@dataclass(frozen=True)
class Reading:
    """What a former rule says: its verdict, the mean over `seeds` seeds; `wanted` are those it asked for."""

    verdict: str
    mean: float | None
    seeds: int
    wanted: int
    kind: str

    @property
    def figure(self) -> str | None:
        """The mean with its unit."""
        if self.mean is None:
            return None
        return f"{self.mean:.2f} ×" if self.kind == "value" else f"{self.mean:+.2f} points"


def judge(was: Former, records: Sequence[Mapping[str, Any]]) -> Reading:
    """The verdict of a former rule on records (see `verdicts.judge`)."""
    mine = [r for r in records if r["chapter"] == was.records.chapter]
    ours = _table(mine, was.records.where)
    theirs = _table(mine, was.records.where | was.records.versus) if was.records.versus else ours.iloc[:0]
    measured = _MEASURES[was.measure.kind](ours, theirs, was.measure)
    if measured.empty:
        return Reading("not run yet", None, 0, was.rule.seeds, was.measure.kind)
    per_seed = measured.groupby("seed")["value"].mean()
    mean, seeds = float(per_seed.mean()), len(per_seed)
    verdict = "not reproduced"
    if mean >= was.rule.partly:
        verdict = "partly"
    if mean >= was.rule.reproduced and seeds >= was.rule.seeds:
        verdict = "reproduced"
    return Reading(verdict, mean, seeds, was.rule.seeds, was.measure.kind)


def _table(records: Sequence[Mapping[str, Any]], where: Mapping[str, Any]) -> pd.DataFrame:
    """Records that meet `where`, one row each: parameters, and metrics as `metric:NAME`."""
    rows = [
        {"seed": 0, **r["parameters"], **{f"metric:{name}": value for name, value in r["metrics"].items()}}
        for r in records
        if meets(r["parameters"], where)
    ]
    return pd.DataFrame(rows) if rows else pd.DataFrame({"seed": []})


def meets(parameters: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether the parameters are those of `where`; a list there means any of them, None means missing."""
    return all(
        parameters.get(name) in (wanted if isinstance(wanted, list) else [wanted])
        for name, wanted in where.items()
    )


def _columns(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    return frame.dropna(subset=list(names)) if set(names) <= set(frame.columns) else frame.iloc[:0]


def _value(ours: pd.DataFrame, theirs: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    metric = f"metric:{measure.metric}"
    return _columns(ours, [metric]).assign(value=lambda t: t.get(metric))


def _margin(ours: pd.DataFrame, theirs: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    metric, minus = f"metric:{measure.metric}", f"metric:{measure.minus}"
    found = _columns(ours, [metric, minus])
    return found.assign(value=found[metric] - found[minus]) if len(found) else found


def _paired(ours: pd.DataFrame, theirs: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    metric, keys = f"metric:{measure.metric}", ["seed", *measure.per]
    a, b = _columns(ours, [metric, *keys]), _columns(theirs, [metric, *keys])
    if a.empty or b.empty:
        return a.iloc[:0]
    means = {side: frame.groupby(keys)[metric].mean() for side, frame in (("a", a), ("b", b))}
    pair = pd.concat(means, axis=1).dropna()
    return (pair["a"] - pair["b"]).rename("value").reset_index()


def _spread(ours: pd.DataFrame, theirs: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """Range over the values of `over` at which both sides were run; a single value measures nothing."""
    metric, over = f"metric:{measure.metric}", str(measure.over)
    a, b = _columns(ours, [metric, over]), _columns(theirs, [metric, over])
    if a.empty or b.empty:
        return a.iloc[:0]
    means = {side: frame.groupby(["seed", over])[metric].mean() for side, frame in (("a", a), ("b", b))}
    both = pd.concat(means, axis=1).dropna()
    grouped = both.groupby("seed").filter(lambda t: len(t) > 1).groupby("seed")
    extent = grouped.max() - grouped.min()
    return (extent["b"] - extent["a"]).rename("value").reset_index()


_MEASURES: dict[str, Callable[[pd.DataFrame, pd.DataFrame, Measure], pd.DataFrame]] = {
    "value": _value,
    "margin": _margin,
    "paired": _paired,
    "spread": _spread,
}
