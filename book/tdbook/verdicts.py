"""Verdicts on the ledger's claims, computed from records.

A verdict rests on an interval: the 95 % confidence interval of the mean difference over seeds. All of it has
to lie on one side of the rule's threshold, otherwise the claim stays inconclusive; so it does with fewer than
three seeds, however large the effect, and where the records are no evidence (`tdbook.evidence`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from scipy.stats import norm, t

from tdbook import evidence, former
from tdbook.claims import Amendment, Claim, Condition, Measure, Rule

NOT_RUN, INCONCLUSIVE = "not run yet", "inconclusive"
REPRODUCED, PARTLY, NOT_REPRODUCED = "reproduced", "partly", "not reproduced"
CONFIDENCE = 0.95
SEEDS = 3  # that a verdict needs: the interval of two rests on one difference of theirs

Record = evidence.Record
PerSeed = dict[Any, float]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Finding:
    """What the records of one setting at one scale say.

    reading: the verdict that they would carry. ours, theirs: mean of each metric over the seeds that both
    sides have, the best first. mean, interval: of the difference (None: not measured, or by one seed alone).
    beside: the same against the measure's `beside`. images: of the test set. networks: how many different
    ones the runs started from. labels: whether any run used them; else seeds are draws of calibration images.
    scales: the records' own words.
    began: the day of the first run. why: what keeps the finding from a verdict, or weakens it.
    """

    reading: str
    seeds: int = 0
    images: int | None = None
    networks: int = 0
    labels: bool = True
    ours: Mapping[str, float] = field(default_factory=dict)
    theirs: Mapping[str, float] = field(default_factory=dict)
    mean: float | None = None
    interval: Interval | None = None
    beside: tuple[float, Interval | None] | None = None
    scales: tuple[str, ...] = ()
    began: str = ""
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim in one setting; reduced: what runs of reduced scale say, which is no verdict.

    former: the claim's amendments, each with what the rule that it replaced says of the records up to that
    day; a rule on an interval has a finding for each setting.
    """

    claim: Claim
    setting: Mapping[str, Any]
    found: Finding
    reduced: Finding | None
    former: tuple[tuple[Amendment, former.Reading | list[Verdict]], ...]

    @property
    def verdict(self) -> str:
        """In one word."""
        return self.found.reading


@dataclass(frozen=True)
class _Side:
    """The records of one side: metric -> seed -> value, and what is wrong with them."""

    records: list[Record]
    values: dict[str, PerSeed]
    problems: list[str]


def judge(claim: Claim, records: Sequence[Record], old: Sequence[Record] = ()) -> list[Verdict]:
    """The verdicts on one claim, one for each of its settings.

    records: as `records.read_record` gives them. old: records that feed no verdict, which former rules read
    too.
    """
    mine = [r for r in records if r["chapter"] == claim.records.chapter]
    was = tuple((change, _formerly(rule, change, [*old, *records])) for change, rule in claim.former())
    verdicts = []
    for where, smaller in zip(claim.records.settings, claim.records.reduced, strict=True):
        reduced = _found(claim, mine, smaller) if where["profile"] == "full" else None
        shown = None if reduced is None or reduced.reading == NOT_RUN else reduced
        verdicts.append(Verdict(claim, where, _found(claim, mine, where), shown, was))
    return verdicts


def judge_all(
    claims: Sequence[Claim], records: Sequence[Record], old: Sequence[Record] = ()
) -> list[Verdict]:
    """Verdicts in the ledger's order."""
    return [verdict for claim in claims for verdict in judge(claim, records, old)]


def _formerly(
    rule: former.Former | Claim, change: Amendment, records: Sequence[Record]
) -> former.Reading | list[Verdict]:
    """What a former rule says of the records up to the day of its end; later ones do not touch it."""
    known = [r for r in records if r["created"][:10] <= change.date.isoformat()]
    return judge(rule, known) if isinstance(rule, Claim) else former.judge(rule, known)


def interval(differences: Sequence[float], error: float = 0.0) -> Interval | None:
    """Student's 95 % confidence interval of the mean of differences, one a seed; None of fewer than two.

    error: a further standard error of the mean, that of the test set, added in quadrature.
    """
    if len(differences) < 2:
        return None
    quantile = (1 + CONFIDENCE) / 2
    seeds = t.ppf(quantile, len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    half = math.hypot(float(seeds), float(norm.ppf(quantile)) * error)
    return fmean(differences) - half, fmean(differences) + half


def reading(found: Interval, rule: Rule) -> str:
    """What an interval says under a rule."""
    low, high = found
    if low >= rule.partly:
        return REPRODUCED if low >= rule.reproduced else PARTLY
    return NOT_REPRODUCED if high < rule.partly else INCONCLUSIVE


def _found(claim: Claim, records: Sequence[Record], where: Mapping[str, Any]) -> Finding:
    """A finding with its reading, the claim's conditions taken into account."""
    found = _measured(records, where, claim.records.versus, claim.measure)
    if found.reading == NOT_RUN:
        return found
    unmet = [_unmet(condition, records, where) for condition in claim.provided]
    why = (*found.why, *filter(None, unmet))
    decided = found.interval is not None and not why
    if found.began < claim.since.isoformat():
        why = (*why, f"a run is older than the rule of {claim.since}")
    result = reading(found.interval, claim.rule) if found.interval and decided else INCONCLUSIVE
    return replace(found, reading=result, why=why)


def _unmet(condition: Condition, records: Sequence[Record], where: Mapping[str, Any]) -> str | None:
    """Why the condition does not hold, None where it does."""
    found = _measured(records, {**where, **condition.of}, condition.versus, condition.measure)
    if found.interval is not None and not found.why and found.interval[0] >= condition.least:
        return None
    measured = "" if found.mean is None else f": {spelt(found.mean, found.interval, condition.measure.unit)}"
    return f"judged only where {condition.text}{measured or ': not measured'}"


def spelt(mean: float, found: Interval | None, unit: str) -> str:
    """A difference with its interval and unit, as in "+1.20 [+0.80; +1.60] points"."""
    sign = "" if unit == "×" else "+"
    within = "" if found is None else f" [{found[0]:{sign}.2f}; {found[1]:{sign}.2f}]"
    return f"{mean:{sign}.2f}{within} {unit}"


def _measured(
    records: Sequence[Record], where: Mapping[str, Any], versus: Mapping[str, Any] | None, measure: Measure
) -> Finding:
    """The finding before the rule is asked."""
    a = _side(records, where, measure.metrics, measure.over)
    b = a
    if versus is not None:
        b = _side(records, {**where, **versus}, measure.metrics, measure.over)
    elif measure.minus is not None:
        b = _side(records, where, [measure.minus], measure.over)
    if not a.records or not b.records:
        return Finding(NOT_RUN)
    alone = b is a
    used = a.records if alone else [*a.records, *b.records]
    seeds = sorted(set.intersection(*(set(v) for side in (a, b) for v in side.values.values())))
    tested = [r["metrics"].get("n") for r in used]
    images = None if None in tested else min(tested)
    scales = tuple(dict.fromkeys(r["scale"] for r in used))
    about: dict[str, Any] = {
        "images": images,
        "networks": len({r.get("start") for r in used}),
        "labels": any(r["metrics"].get("labels") for r in used),
        "scales": scales,
        "began": min(r["created"][:10] for r in used),
    }
    problems = list(dict.fromkeys([*a.problems, *b.problems]))
    if problems or not seeds:
        return Finding(INCONCLUSIVE, why=tuple(problems or ["the two sides share no seed"]), **about)
    # Of ranges the smaller is the better, of all else the larger.
    ours, theirs = (_means(side.values, seeds, descending=measure.over is None) for side in (a, b))
    best, other = a.values[next(iter(ours))], b.values[next(iter(theirs))]
    sign = -1 if measure.over else 1
    differences = [best[seed] if alone else sign * (best[seed] - other[seed]) for seed in seeds]
    compared, error = [*(versus or {}), *measure.own], 0.0
    why = evidence.refused(used, where["profile"])
    if not alone:
        why += evidence.unequal(
            a.records, b.records, seeds, compared=compared, over=measure.over, equal=measure.equal
        )
    accuracies = measure.over is None and measure.unit == "points"
    if accuracies and not about["labels"]:
        if images is None:
            why.append("its records do not say on how many images they were tested")
        else:
            error = _sampling([max(means.values()) for means in (ours, theirs)[: 1 if alone else 2]], images)
    if len(seeds) < SEEDS:
        why.append(f"{len(seeds)} of the {SEEDS} seeds that a verdict needs")
    return Finding(
        INCONCLUSIVE, seeds=len(seeds), ours=ours, theirs={} if alone else theirs, mean=fmean(differences),
        interval=interval(differences, error), beside=_beside(measure, records, where, best), why=tuple(why),
        **about,
    )  # fmt: skip


def _beside(
    measure: Measure, records: Sequence[Record], where: Mapping[str, Any], best: PerSeed
) -> tuple[float, Interval | None] | None:
    """The difference from the measure's `beside`, where the records have it."""
    if measure.beside is None:
        return None
    further = _side(records, where, [measure.beside], None).values[measure.beside]
    shared = [value - further[seed] for seed, value in best.items() if seed in further]
    return (fmean(shared), interval(shared)) if shared else None


def _side(
    records: Sequence[Record], where: Mapping[str, Any], metrics: Sequence[str], over: str | None
) -> _Side:
    """The records that meet `where`. over: the values are ranges of the metric over this parameter."""
    found = [r for r in records if former.meets(r["parameters"], where)]
    values: dict[str, PerSeed] = {}
    for metric in metrics:
        runs: dict[Any, list[float]] = {}
        for r in found:
            if r["metrics"].get(metric) is not None:
                runs.setdefault(r["parameters"].get("seed"), []).append(r["metrics"][metric])
        if over is None:
            values[metric] = {seed: run[0] for seed, run in runs.items()}
        else:
            whole = {seed: run for seed, run in runs.items() if len(run) == len(where[over])}
            values[metric] = {seed: max(run) - min(run) for seed, run in whole.items()}
    lacking = [metric for metric in metrics if found and not values[metric]]
    problems = [f"its records lack {', '.join(lacking)}"] if lacking else []
    return _Side(found, values, problems + evidence.mixed(found, over))


def _means(values: Mapping[str, PerSeed], seeds: Sequence[Any], descending: bool) -> dict[str, float]:
    """Metric -> its mean over the seeds, the best first."""
    means = {metric: fmean(per_seed[seed] for seed in seeds) for metric, per_seed in values.items()}
    return dict(sorted(means.items(), key=lambda pair: pair[1], reverse=descending))


def _sampling(accuracies: Sequence[float], images: int) -> float:
    """Standard error, in points, of a difference of accuracies (percent) on `images` test images each.

    They are taken as independent, which errs on the safe side: on the same images it is smaller.
    """
    shares = [accuracy / 100 for accuracy in accuracies]
    return 100 * math.sqrt(sum(p * (1 - p) for p in shares) / images)
