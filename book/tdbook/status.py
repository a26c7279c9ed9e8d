"""The tables "Reproduction status": every claim with its setting, runs, figures and verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

from tdbook import papers, style, tables
from tdbook.claims import Claim, Reported
from tdbook.former import Reading
from tdbook.verdicts import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    NOT_RUN,
    PARTLY,
    REPRODUCED,
    Finding,
    Verdict,
    spelt,
)

#: How the verdicts are called where a claim is the book's own.
_OWN = {REPRODUCED: "holds", PARTLY: "holds in part", NOT_REPRODUCED: "does not hold"}

_HEADINGS = {
    True: "Claims of the papers' titles and abstracts",
    False: "Further claims of the papers",
    None: "The book's own",
}

#: Parameters and metrics as the text writes them.
_WORDS = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet",
    "imagenet-sample": "ImageNet sample",
    "cnn": "small CNN", "resnet18": "ResNet-18", "resnet20": "ResNet-20", "resnet32": "ResNet-32",
    **style.UNITS,
    "test_accuracy_before": "as is", "test_accuracy_recalibrated": "BatchNorm re-estimated",
    "dense_test_accuracy": "dense", "start_test_accuracy": "the dense network that it started from",
}  # fmt: skip


def markdown(verdicts: Sequence[Verdict]) -> str:
    """All claims, those of the abstracts first, a row for each setting; settings not run share one."""
    parts = []
    for kind, heading in _HEADINGS.items():
        rows = [row for rows in _by_claim(verdicts) if _kind(rows[0].claim) is kind for row in _rows(rows)]
        if rows:
            parts.append(f"**{heading}**\n\n{tables.markdown(rows)}")
    return "\n\n".join(parts)


def counts(verdicts: Sequence[Verdict]) -> str:
    """How many verdicts there are of each kind, as a sentence for the papers' claims and one for our own."""
    lines = []
    kinds = (REPRODUCED, PARTLY, NOT_REPRODUCED, INCONCLUSIVE, NOT_RUN)
    for whose, own in (("of the papers", False), ("of the book's own", True)):
        mine = [one for one in verdicts if (one.claim.paper is None) is own]
        claims, found = len(_by_claim(mine)), Counter(one.verdict for one in mine)
        said = ", ".join(f"{_OWN.get(kind, kind) if own else kind} {found[kind]}" for kind in kinds)
        scale = ", all at reduced scale" if mine and all(map(_at_reduced_scale, mine)) else ""
        lines.append(f"{_number(claims, 'claim')} {whose} in {_number(len(mine), 'setting')}{scale}: {said}.")
    return " ".join(lines)


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def amendments(verdicts: Sequence[Verdict]) -> str:
    """Why rules were changed, a list, and under each reason the claims that it changed, with what their rules
    had said."""
    reasons: dict[str, list[str]] = {}
    for rows in _by_claim(verdicts):
        for change, was in rows[0].former:
            wording = f", as “{change.was.claim}”" if change.was and change.was.claim else ""
            without = f", without conditions on {', '.join(change.added)}" if change.added else ""
            said = f"Until then{wording}{without}: {_former(was) or NOT_RUN}."
            changed = reasons.setdefault(f"- {change.date}: {change.reason.strip()}", [])
            changed.append(f"  - {rows[0].claim.claim}. {said}")
    return "\n".join(line for reason, changed in reasons.items() for line in [reason, *changed])


def _by_claim(verdicts: Sequence[Verdict]) -> list[list[Verdict]]:
    return [list(rows) for _, rows in groupby(verdicts, key=lambda v: v.claim.id)]


def _kind(claim: Claim) -> bool | None:
    return claim.headline if claim.paper else None


def _rows(verdicts: list[Verdict]) -> list[dict[str, str]]:
    """The rows of one claim; it is named in the first, which says also what former rules say."""
    open_ = [v for v in verdicts if v.verdict == NOT_RUN and v.reduced is None]
    run = [[v] for v in verdicts if v not in open_]
    rows = [_row(group) for group in [*run, *([open_] if open_ else [])]]
    now = {(one.mean, one.reading) for v in verdicts for one in (v.found, v.reduced) if one is not None}
    said = filter(None, (_former(was, now) for _, was in verdicts[0].former))
    rows[0]["Verdict"] = _lines(rows[0]["Verdict"], *(f"by a former rule: {one}" for one in said))
    for row in rows[1:]:
        row["Claim"] = "″"
    return rows


def _row(verdicts: list[Verdict]) -> dict[str, str]:
    """A row; of several verdicts, none of which was run."""
    first = verdicts[0]
    claim, found = first.claim, first.found
    seen = claim.seen and f"seen before: {claim.seen}"
    return {
        "Claim": _lines(claim.claim, _stated(claim), _rule(claim), seen),
        "Verdict": _lines(_verdict(first), _reduced(first.reduced, claim)),  # early: a narrow screen shows it
        "Setting and runs": _lines(settings([v.setting for v in verdicts]), _runs(found)),
        "Measured": _lines(_difference(found, claim), _sides(found, claim.measure.unit)),
    }


def _lines(*texts: str | None) -> str:
    return "<br>".join(filter(None, texts))


def _stated(claim: Claim) -> str | None:
    """What the paper says of it, and where: "*Yin et al., CVPR 2021, abstract: +1.96 points*"."""
    if claim.paper is None or claim.reported is None:
        return None
    paper = papers.load(claim.paper)
    source = [f"{paper.authors.split(',')[0]} et al.", paper.venue, claim.reported.source]
    return f"*{', '.join(filter(None, source))}: {_reported(claim.reported)}*"


def _rule(claim: Claim) -> str:
    """Where the verdicts begin: "rule: reproduced from +1, partly from 0 points"."""
    bounds = {REPRODUCED: claim.rule.reproduced, PARTLY: claim.rule.partly}
    sign = "" if claim.measure.unit == "×" else "+"
    parts = [f"{_called(kind, claim)} from {_signed(bound, sign)}" for kind, bound in bounds.items()]
    return f"rule: {', '.join(parts)} {claim.measure.unit}"


def _signed(value: float, sign: str = "+") -> str:
    return f"{value:{sign}g}" if value else "0"


def _called(kind: str, claim: Claim) -> str:
    """A verdict's name: a claim of our own holds, or does not."""
    return kind if claim.paper else _OWN.get(kind, kind)


def settings(wheres: Sequence[Mapping[str, Any]]) -> str:
    """Settings in words, ratios of one kind together: "CIFAR-10, ResNet-20, Tucker-2, 2×, 4× parameters"."""
    ratios: dict[tuple[str, str], list[str]] = {}
    for where in wheres:
        names = [where["dataset"], where["model"].rpartition(":")[2], where["format"]]
        before = ", ".join(_word(style.label(name)) for name in names if name is not None)
        of = where.get("of", "network")
        after = f" {_word(where['by'])}{'' if of == 'network' else f' of the {of}'}" if where["by"] else ""
        one = where["ratio"] if isinstance(where["ratio"], list) else [where["ratio"]]
        ratios.setdefault((before, after), []).extend(f"{r:g}×" for r in one if r is not None)
    return "; ".join(", ".join([before, *rs]) + after for (before, after), rs in ratios.items())


def _word(name: str) -> str:
    return _WORDS.get(name, name)


def _reported(reported: Reported) -> str:
    mark = papers.MARKS[reported.mark]
    if reported.value is not None:
        return f"{_signed(reported.value)} {reported.unit}{mark}"
    return f"{reported.text}{mark.replace(' reported', ', reported')}"


def _runs(found: Finding) -> str | None:
    """Scale and numbers: "full; 3 seeds, 1 starting network, 10,000 images measured"."""
    if found.reading == NOT_RUN:
        return None
    numbers = [_number(found.seeds, "seed" if found.labels else "draw")]
    numbers.append(_number(found.networks, "starting network"))
    numbers += [f"{found.images:,} images measured"] if found.images is not None else []
    return f"{' / '.join(found.scales)}; {', '.join(numbers)}"


def _sides(found: Finding, unit: str) -> str | None:
    """The figures of both sides, the one that counts first."""
    if not found.ours:
        return None
    sides = [side for side in (found.ours, found.theirs) if side]
    return " against ".join(" or ".join(_figure(name, mean, unit, len(side)) for name, mean in side.items())
                            for side in sides)  # fmt: skip


def _figure(metric: str, mean: float, unit: str, of: int) -> str:
    text = f"{mean:.2f} {unit.replace('points', '%')}"
    return f"{text} {_word(metric)}" if of > 1 or metric == "dense_test_accuracy" else text


def _difference(found: Finding, claim: Claim) -> str | None:
    if found.mean is None:
        return None
    text = spelt(found.mean, found.interval, claim.measure.unit)
    if found.beside is None:
        return text
    return f"{text}; {spelt(*found.beside, claim.measure.unit)} against {_word(claim.measure.beside or '')}"


def _verdict(verdict: Verdict) -> str:
    found = verdict.found
    judged = found.reading not in (NOT_RUN, INCONCLUSIVE)
    scale = "reduced: " if judged and _at_reduced_scale(verdict) else ""
    why = f": {'; '.join(found.why)}" if found.why else ""
    return f"**{scale}{_called(found.reading, verdict.claim)}**{why}"


def _at_reduced_scale(verdict: Verdict) -> bool:
    """Whether it is of reduced runs, as a claim of the book's own may be."""
    return bool(verdict.setting["profile"] == "reduced")


def _reduced(found: Finding | None, claim: Claim) -> str | None:
    """What reduced runs say: "no verdict, reduced: 9 epochs; 2 seeds: +0.20 points: inconclusive"."""
    if found is None:
        return None
    figures = ", ".join(filter(None, [_difference(found, claim), _sides(found, claim.measure.unit)]))
    read = "; ".join([found.reading, *found.why])
    return f"no verdict, {': '.join(filter(None, [_runs(found), figures, read]))}"


def _former(said: Reading | list[Verdict], now: Collection[tuple[float | None, str]] = ()) -> str | None:
    """What a former rule says, as in "not reproduced (-1.33 points, 1 of 3 seeds)", if anything.

    now: means and readings by the present rule, which need not be said again.
    """
    if isinstance(said, Reading):
        few = f" of {said.wanted}" if said.seeds < said.wanted else ""
        seeds = f"{said.seeds}{few} seed{'s' if said.seeds > 1 or few else ''}"
        return None if said.figure is None else f"{said.verdict} ({said.figure}, {seeds})"
    several, parts = len(said) > 1, []
    for one in said:
        where = f"{settings([one.setting])}: " if several else ""
        for scale, found in (("", one.found), ("reduced: ", one.reduced)):
            if found is not None and found.mean is not None and (found.mean, found.reading) not in now:
                figure = f"{_difference(found, one.claim)}, {_number(found.seeds, 'seed')}"
                parts.append(f"{where}{scale}{_called(found.reading, one.claim)} ({figure})")
    return "; ".join(parts) or None
