"""The tables "Reproduction status": every claim with its setting, runs, figures and verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from tdbook import papers, style, tables
from tdbook.claims import Claim, Reported
from tdbook.former import Former, Reading
from tdbook.verdicts import NOT_REPRODUCED, NOT_RUN, PARTLY, REPRODUCED, Finding, Verdict, spelt

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
    "params": "parameters", "macs": "MACs",
    "test_accuracy_before": "as is", "test_accuracy_recalibrated": "BatchNorm re-estimated",
    "dense_test_accuracy": "dense", "start_test_accuracy": "the dense network that it started from",
}  # fmt: skip


def markdown(verdicts: Sequence[Verdict]) -> str:
    """All claims, those of the abstracts first, a row for each setting; settings not run share one."""
    parts = []
    for kind, heading in _HEADINGS.items():
        rows = [row for rows in _by_claim(verdicts) if _kind(rows[0].claim) is kind for row in _rows(rows)]
        if rows:
            used = {name for row in rows for name, value in row.items() if value is not None}
            shown = [{name: value for name, value in row.items() if name in used} for row in rows]
            parts.append(f"**{heading}**\n\n{tables.markdown(shown)}")
    return "\n\n".join(parts)


def amendments(verdicts: Sequence[Verdict]) -> str:
    """Why rules were changed, and what they had said, as a list."""
    lines = []
    for rows in _by_claim(verdicts):
        for change, was in rows[0].former:
            wording = f" (“{change.was.claim}”)" if change.was.claim else ""
            said = f"Until then{wording}: {_former(change.was, was)}."
            lines.append(f"- *{rows[0].claim.id}*, {change.date}: {change.reason.strip()} {said}")
    return "\n".join(lines)


def _by_claim(verdicts: Sequence[Verdict]) -> list[list[Verdict]]:
    return [list(rows) for _, rows in groupby(verdicts, key=lambda v: v.claim.id)]


def _kind(claim: Claim) -> bool | None:
    return claim.headline if claim.paper else None


def _rows(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    """The rows of one claim; it is named in the first."""
    open_ = [v for v in verdicts if v.verdict == NOT_RUN and v.reduced is None]
    run = [[v] for v in verdicts if v not in open_]
    rows = [_row(group) for group in [*run, *([open_] if open_ else [])]]
    again = {"Paper": "″", "Claim": "″", "Reported": "″"}
    former = [_former(a.was, was) for a, was in verdicts[0].former]
    said = "; ".join(former) if any(was.mean is not None for _, was in verdicts[0].former) else None
    for i, row in enumerate(rows):
        if i:
            row |= {name: again[name] for name in again if row[name] is not None}
        row["By former rules"] = said if i == 0 or said is None else "″"
    return rows


def _row(verdicts: list[Verdict]) -> dict[str, Any]:
    """A row; of several verdicts, none of which was run."""
    first = verdicts[0]
    claim, found, unit = first.claim, first.found, first.claim.measure.unit
    paper = papers.load(claim.paper) if claim.paper else None
    return {
        "Paper": f"{paper.authors.split(',')[0]} et al., {paper.venue}" if paper else None,
        "Claim": claim.claim,
        "Reported": _reported(claim.reported) if claim.reported else None,
        "Setting": settings([v.setting for v in verdicts]),
        "Runs": _runs(found),
        "Both sides": _sides(found, unit),
        "Difference": _difference(found, claim),
        "Verdict": _verdict(found, claim),
        "Reduced runs, no verdict": _reduced(first.reduced, claim),
    }


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
        return f"{reported.value:+g} {reported.unit}{mark}"
    return f"{reported.text}{mark.replace(' reported', ', reported')}"


def _runs(found: Finding) -> str | None:
    """Scale and numbers: "full; 3 seeds, 10000 test images"."""
    if found.reading == NOT_RUN:
        return None
    numbers = [f"{found.seeds} seed{'s' if found.seeds != 1 else ''}"]
    numbers += [f"{found.images} test images"] if found.images is not None else []
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


def _verdict(found: Finding, claim: Claim) -> str:
    word = found.reading if claim.paper else _OWN.get(found.reading, found.reading)
    return f"**{word}**" + (f": {'; '.join(found.why)}" if found.why else "")


def _reduced(found: Finding | None, claim: Claim) -> str | None:
    """What reduced runs say, after their scale: "reduced: 9 epochs; 2 seeds: +0.20 points: inconclusive"."""
    if found is None:
        return None
    figures = ", ".join(filter(None, [_difference(found, claim), _sides(found, claim.measure.unit)]))
    return ": ".join(filter(None, [_runs(found), figures, "; ".join([found.reading, *found.why])]))


def _former(rule: Former, read: Reading) -> str:
    """What a former rule says: "not reproduced (-1.33 points, 1 of 3 seeds)"."""
    if read.mean is None:
        return read.verdict
    figure = f"{read.mean:.2f} ×" if rule.measure.kind == "value" else f"{read.mean:+.2f} points"
    few = f" of {read.wanted}" if read.seeds < read.wanted else ""
    return f"{read.verdict} ({figure}, {read.seeds}{few} seed{'s' if read.seeds > 1 or few else ''})"
