"""The ledger of the papers' claims and the verdicts that follow from the records.

`book/claims.yml` says, for every claim, what the paper reports, which records test it, how they become one
number and from which value on the claim counts as reproduced. Verdicts are computed here, never typed:
reproduced, partly, not reproduced, not run yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import yaml

from . import papers
from .errors import DataError

VERDICTS = ("reproduced", "partly", "not reproduced", "not run yet")

_NUMBER, _TEXT = {"type": "number"}, {"type": "string", "minLength": 1}
_WHERE = {"type": "object", "minProperties": 1}
_NAMES = {"type": "array", "items": _TEXT}


def _object(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "required": list(required), "properties": properties, "additionalProperties": False,
    }  # fmt: skip


SCHEMA = _object(
    ["claims"],
    claims={
        "type": "array",
        "items": _object(
            ["id", "paper", "claim", "reported", "records", "measure", "rule"],
            id={"type": "string", "pattern": "^[a-z0-9-]+$"},
            paper=_TEXT,
            claim=_TEXT,
            reported=_object(
                ["mark"], value=_NUMBER, unit=_TEXT, text=_TEXT, mark={"enum": list(papers.MARKS)},
                source=_TEXT
            ),
            records=_object(["chapter", "where"], chapter=_TEXT, where=_WHERE, versus=_WHERE),
            measure=_object(
                ["kind", "metric"],
                kind={"enum": ["value", "margin", "paired", "spread"]},
                metric=_TEXT, minus=_TEXT, per=_NAMES, over=_TEXT,
            ),
            rule=_object(
                ["reproduced", "partly", "seeds"],
                reproduced=_NUMBER, partly=_NUMBER, seeds={"type": "integer", "minimum": 1},
            ),
        ),
    },
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What the records say about one claim: mean and sd over `seeds` seeds, `count` measurements."""

    claim: Mapping[str, Any]
    verdict: str
    mean: float | None
    sd: float | None
    seeds: int
    count: int


def load_claims(path: str | Path = "book/claims.yml") -> list[dict[str, Any]]:
    """Read and check the ledger. Raises DataError naming the claim and what is wrong with it."""
    path = Path(path)
    try:
        ledger = yaml.safe_load(path.read_text(encoding="utf-8"))
        jsonschema.validate(ledger, SCHEMA)
    except OSError as problem:
        raise DataError(f"cannot read the ledger of claims: {problem}") from problem
    except (yaml.YAMLError, jsonschema.ValidationError) as problem:
        place = "/".join(str(p) for p in getattr(problem, "absolute_path", ()))
        raise DataError(f"{path}: {place}: {getattr(problem, 'message', problem)}") from problem
    claims: list[dict[str, Any]] = ledger["claims"]
    seen: set[str] = set()
    for claim in claims:
        _check(claim, seen, path)
        seen.add(claim["id"])
    return claims


def judge(claim: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Verdict:
    """The verdict on one claim from records, each a mapping with `chapter`, `parameters` and `metrics`."""
    spec = claim["records"]
    mine = [r for r in records if r["chapter"] == spec["chapter"]]
    ours = _table(mine, spec["where"])
    theirs = _table(mine, spec["where"] | spec["versus"]) if "versus" in spec else ours.iloc[:0]
    measured = _MEASURES[claim["measure"]["kind"]](ours, theirs, claim["measure"])
    if measured.empty:
        return Verdict(claim, "not run yet", None, None, 0, 0)
    per_seed = measured.groupby("seed")["value"].mean()
    mean, seeds, rule = float(per_seed.mean()), len(per_seed), claim["rule"]
    sd = float(per_seed.std(ddof=1)) if seeds > 1 else None
    verdict = "not reproduced"
    if mean >= rule["partly"]:
        verdict = "partly"
    if mean >= rule["reproduced"] and seeds >= rule["seeds"]:
        verdict = "reproduced"
    return Verdict(claim, verdict, mean, sd, seeds, len(measured))


def judge_all(claims: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Verdicts in the ledger's order."""
    return [judge(claim, records) for claim in claims]


def status_markdown(verdicts: Sequence[Verdict]) -> str:
    """The table "Reproduction status" as markdown."""
    lines = ["| Paper | Claim | Reported | Measured here | Verdict |", "|---|---|---|---|---|"]
    for v in verdicts:
        paper = papers.load(v.claim["paper"])
        cells = (f"{paper['authors'].split(',')[0]} et al., {paper['venue']}", v.claim["claim"],
                 _reported(v.claim["reported"]), _measured(v), f"**{v.verdict}**")  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _reported(reported: Mapping[str, Any]) -> str:
    if "value" in reported:
        return f"{reported['value']:+g} {reported['unit']}{papers.MARKS[reported['mark']]}"
    return f"{reported['text']}{papers.MARKS[reported['mark']].replace(' reported', ', reported')}"


def _measured(v: Verdict) -> str:
    if v.mean is None:
        return "–"
    unit = v.claim["reported"].get("unit", "×" if v.claim["measure"]["kind"] == "value" else "points")
    sign = "" if v.claim["measure"]["kind"] == "value" else "+"
    spread = "" if v.sd is None else f" ± {v.sd:.2f}"
    few = f" of {v.claim['rule']['seeds']}" if v.seeds < v.claim["rule"]["seeds"] else ""
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


def _value(ours: pd.DataFrame, theirs: pd.DataFrame, measure: Mapping[str, Any]) -> pd.DataFrame:
    metric = f"metric:{measure['metric']}"
    return _columns(ours, [metric]).assign(value=lambda t: t.get(metric))


def _margin(ours: pd.DataFrame, theirs: pd.DataFrame, measure: Mapping[str, Any]) -> pd.DataFrame:
    metric, minus = f"metric:{measure['metric']}", f"metric:{measure['minus']}"
    found = _columns(ours, [metric, minus])
    return found.assign(value=found[metric] - found[minus]) if len(found) else found


def _paired(ours: pd.DataFrame, theirs: pd.DataFrame, measure: Mapping[str, Any]) -> pd.DataFrame:
    metric, keys = f"metric:{measure['metric']}", ["seed", *measure.get("per", ())]
    a, b = _columns(ours, [metric, *keys]), _columns(theirs, [metric, *keys])
    if a.empty or b.empty:
        return a.iloc[:0]
    means = {side: frame.groupby(keys)[metric].mean() for side, frame in (("a", a), ("b", b))}
    pair = pd.concat(means, axis=1).dropna()
    return (pair["a"] - pair["b"]).rename("value").reset_index()


def _spread(ours: pd.DataFrame, theirs: pd.DataFrame, measure: Mapping[str, Any]) -> pd.DataFrame:
    """Range over the values of `over` at which both sides were run; a single value measures nothing."""
    metric, over = f"metric:{measure['metric']}", measure["over"]
    a, b = _columns(ours, [metric, over]), _columns(theirs, [metric, over])
    if a.empty or b.empty:
        return a.iloc[:0]
    means = {side: frame.groupby(["seed", over])[metric].mean() for side, frame in (("a", a), ("b", b))}
    both = pd.concat(means, axis=1).dropna()
    grouped = both.groupby("seed").filter(lambda t: len(t) > 1).groupby("seed")
    extent = grouped.max() - grouped.min()
    return (extent["b"] - extent["a"]).rename("value").reset_index()


_MEASURES: dict[str, Callable[[pd.DataFrame, pd.DataFrame, Mapping[str, Any]], pd.DataFrame]] = {
    "value": _value,
    "margin": _margin,
    "paired": _paired,
    "spread": _spread,
}


def _check(claim: Mapping[str, Any], seen: set[str], path: Path) -> None:
    kind, measure, reported = claim["measure"]["kind"], claim["measure"], claim["reported"]
    wanted = {"margin": "minus", "spread": "over"}.get(kind)
    two_sided, figure = ("paired", "spread"), {"value", "unit"}
    problems = {
        "its id is used twice": claim["id"] in seen,
        f"paper {claim['paper']!r} is none of {papers.available()}": claim["paper"] not in papers.available(),
        f"measure {kind} needs {wanted}": wanted is not None and wanted not in measure,
        f"measure {kind} needs records.versus": kind in two_sided and "versus" not in claim["records"],
        "reported needs value and unit, or text": "text" not in reported and not figure <= set(reported),
        "a figure marked V or V-calc needs its source": reported["mark"] != "M" and "source" not in reported,
        "partly must not ask for more than reproduced": claim["rule"]["partly"] > claim["rule"]["reproduced"],
    }
    for text, wrong in problems.items():
        if wrong:
            raise DataError(f"{path}: claim {claim['id']}: {text}")
