"""The ledger of the papers' claims and the verdicts that follow from the records.

`book/claims.yml` says, for every claim, what the paper reports, which records test it, how they become one
number and from which value on the claim counts as reproduced. Verdicts are computed here, never typed:
reproduced, partly, not reproduced, not run yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import yaml
from pydantic import Field, model_validator

from tdbook import papers, tables
from tdbook.paths import BOOK
from tdbook.schema import Strict, Text, validate
from tdlib.errors import DataError


class Reported(Strict):
    """The paper's statement: a value with its unit, or a text."""

    value: float | None = None
    unit: Text | None = None
    text: Text | None = None
    mark: papers.Mark
    source: Text | None = None


class Source(Strict):
    """Which records test a claim: those of a chapter whose parameters meet `where`; `versus` changes some."""

    chapter: Text
    where: Annotated[dict[str, Any], Field(min_length=1)]
    versus: Annotated[dict[str, Any], Field(min_length=1)] | None = None


class Measure(Strict):
    """How records become one number per seed; the kinds are explained at the top of the ledger."""

    kind: Literal["value", "margin", "paired", "spread"]
    metric: Text
    minus: Text | None = None
    per: list[Text] = Field(default_factory=list)
    over: Text | None = None


class Rule(Strict):
    """The smallest mean over seeds for either verdict; with fewer seeds it is at best "partly"."""

    reproduced: float
    partly: float
    seeds: Annotated[int, Field(ge=1)]


class Claim(Strict):
    """One row of the ledger."""

    id: Annotated[str, Field(pattern="^[a-z0-9-]+$")]
    paper: Text
    claim: Text
    reported: Reported
    records: Source
    measure: Measure
    rule: Rule

    @model_validator(mode="after")
    def _consistent(self) -> Claim:
        kind, reported = self.measure.kind, self.reported
        wanted = {"margin": "minus", "spread": "over"}.get(kind)
        without_figure = reported.text is None and None in (reported.value, reported.unit)
        problems = {
            f"paper {self.paper!r} is none of {papers.available()}": self.paper not in papers.available(),
            f"measure {kind} needs {wanted}": wanted is not None and getattr(self.measure, wanted) is None,
            f"measure {kind} needs records.versus": kind in ("paired", "spread") and not self.records.versus,
            "reported needs value and unit, or text": without_figure,
            "a figure marked V or V-calc needs its source": reported.mark != "M" and reported.source is None,
            "partly must not ask for more than reproduced": self.rule.partly > self.rule.reproduced,
        }
        for text, wrong in problems.items():
            if wrong:
                raise ValueError(f"claim {self.id}: {text}")
        return self


class Ledger(Strict):
    """The whole file."""

    claims: list[Claim]

    @model_validator(mode="after")
    def _distinct(self) -> Ledger:
        ids = [claim.id for claim in self.claims]
        for name in ids:
            if ids.count(name) > 1:
                raise ValueError(f"claim {name}: its id is used twice")
        return self


@dataclass(frozen=True)
class Verdict:
    """What the records say about one claim: mean and sd over `seeds` seeds, `count` measurements."""

    claim: Claim
    verdict: str
    mean: float | None
    sd: float | None
    seeds: int
    count: int


def load_claims(path: str | Path = BOOK / "claims.yml") -> list[Claim]:
    """Read and check the ledger. Raises DataError naming the claim and what is wrong with it."""
    try:
        ledger = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise DataError(f"cannot read the ledger of claims: {problem}") from problem
    except yaml.YAMLError as problem:
        raise DataError(f"{path} is not YAML: {problem}") from problem
    return validate(Ledger, ledger, str(path)).claims


def judge(claim: Claim, records: Sequence[Mapping[str, Any]]) -> Verdict:
    """The verdict on one claim from records, each a mapping with `chapter`, `parameters` and `metrics`."""
    spec, rule = claim.records, claim.rule
    mine = [r for r in records if r["chapter"] == spec.chapter]
    ours = _table(mine, spec.where)
    theirs = _table(mine, spec.where | spec.versus) if spec.versus else ours.iloc[:0]
    measured = _MEASURES[claim.measure.kind](ours, theirs, claim.measure)
    if measured.empty:
        return Verdict(claim, "not run yet", None, None, 0, 0)
    per_seed = measured.groupby("seed")["value"].mean()
    mean, seeds = float(per_seed.mean()), len(per_seed)
    sd = float(per_seed.std(ddof=1)) if seeds > 1 else None
    verdict = "not reproduced"
    if mean >= rule.partly:
        verdict = "partly"
    if mean >= rule.reproduced and seeds >= rule.seeds:
        verdict = "reproduced"
    return Verdict(claim, verdict, mean, sd, seeds, len(measured))


def judge_all(claims: Sequence[Claim], records: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Verdicts in the ledger's order."""
    return [judge(claim, records) for claim in claims]


def status_markdown(verdicts: Sequence[Verdict]) -> str:
    """The table "Reproduction status" as markdown."""
    rows = []
    for v in verdicts:
        paper = papers.load(v.claim.paper)
        rows.append({
            "Paper": f"{paper.authors.split(',')[0]} et al., {paper.venue}",
            "Claim": v.claim.claim,
            "Reported": _reported(v.claim.reported),
            "Measured here": _measured(v),
            "Verdict": f"**{v.verdict}**",
        })  # fmt: skip
    return tables.markdown(rows)


def _reported(reported: Reported) -> str:
    mark = papers.MARKS[reported.mark]
    if reported.value is not None:
        return f"{reported.value:+g} {reported.unit}{mark}"
    return f"{reported.text}{mark.replace(' reported', ', reported')}"


def _measured(v: Verdict) -> str:
    if v.mean is None:
        return "–"
    plain = v.claim.measure.kind == "value"
    unit = v.claim.reported.unit or ("×" if plain else "points")
    sign = "" if plain else "+"
    spread = "" if v.sd is None else f" ± {v.sd:.2f}"
    few = f" of {v.claim.rule.seeds}" if v.seeds < v.claim.rule.seeds else ""
    return f"{v.mean:{sign}.2f}{spread} {unit} ({v.seeds}{few} seed{'s' if v.seeds > 1 or few else ''})"


def _table(records: Sequence[Mapping[str, Any]], where: Mapping[str, Any]) -> pd.DataFrame:
    """Records that meet `where`, one row each: parameters, and metrics as `metric:NAME`."""
    rows = [
        {"seed": 0, **r["parameters"], **{f"metric:{name}": value for name, value in r["metrics"].items()}}
        for r in records
        if all(_meets(r["parameters"].get(name), wanted) for name, wanted in where.items())
    ]
    return pd.DataFrame(rows) if rows else pd.DataFrame({"seed": []})


def _meets(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list) else value == wanted


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
