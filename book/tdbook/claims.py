"""The ledger of the papers' claims, `book/claims.yml`: what is claimed, which records test it, by which rule.

The file's head explains its keys. Verdicts are computed by `tdbook.verdicts`, never typed.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from tdbook import papers
from tdbook.former import Former
from tdbook.paths import BOOK
from tdbook.schema import Strict, Text, validate
from tdlib.errors import DataError

#: Parameters that a claim has to fix (None: it has none), so that records of different settings never mix.
SETTING = ("dataset", "model", "format", "ratio", "by", "profile")

Conditions = dict[str, Any]


class Reported(Strict):
    """The paper's statement: a value with its unit, or a text."""

    value: float | None = None
    unit: Text | None = None
    text: Text | None = None
    mark: papers.Mark
    source: Text | None = None


class Source(Strict):
    """Which records test a claim: those of a chapter whose parameters meet `where` and, where there is a list
    of settings, one of `each`; `versus` changes some for the side that they are compared with. recipe:
    further conditions, which runs of reduced scale need not meet."""

    chapter: Text
    where: Annotated[Conditions, Field(min_length=1)]
    each: list[Conditions] = Field(default_factory=lambda: [Conditions()], min_length=1)
    versus: Conditions | None = None
    recipe: Conditions = Field(default_factory=dict)

    @property
    def settings(self) -> list[Conditions]:
        """Every setting that is judged by itself."""
        return [self.where | self.recipe | one for one in self.each]

    @property
    def reduced(self) -> list[Conditions]:
        """The same settings at reduced scale."""
        return [self.where | one | {"profile": "reduced"} for one in self.each]

    def without(self, names: list[str]) -> Source:
        """The same with fewer conditions."""
        fewer = {
            part: {name: value for name, value in getattr(self, part).items() if name not in names}
            for part in ("where", "recipe")
        }
        return self.model_copy(update=fewer)


class Measure(Strict):
    """How the records of one setting become a number per seed; the ledger's head explains the keys."""

    metric: Text | Annotated[list[Text], Field(min_length=2)]
    minus: Text | None = None
    over: Text | None = None
    equal: list[Text] = Field(default_factory=list)
    own: list[Text] = Field(default_factory=list)
    beside: Text | None = None
    unit: Text = "points"

    @property
    def metrics(self) -> list[str]:
        """Those of which the best counts."""
        return [self.metric] if isinstance(self.metric, str) else self.metric


class Condition(Strict):
    """What must hold before the claim is judged: `measure` of the records that `of` changes the claim's to,
    against those of `versus`, is at least `least` by its whole interval. text: the condition in words."""

    text: Text
    measure: Measure
    least: float
    of: Conditions = Field(default_factory=dict)
    versus: Conditions | None = None


class Rule(Strict):
    """From where on the interval has to lie for either verdict."""

    reproduced: float
    partly: float


class Earlier(Strict):
    """A rule on an interval, as now, that was: what it had otherwise than the rule that followed."""

    claim: Text | None = None
    records: Source | None = None
    measure: Measure | None = None
    provided: list[Condition] | None = None
    rule: Rule | None = None


class Amendment(Strict):
    """On this day, for this reason, the rule `was` gave way to the one that follows it; or conditions were
    `added` to its `where`, and it was the same without them."""

    date: date
    reason: Text
    was: Former | Earlier | None = None
    added: list[Text] = Field(default_factory=list)

    def before(self, then: Claim) -> Claim:
        """The rule before this change, as the claim that it made. then: the one after it."""
        given: dict[str, Any] = {"since": date.min, "amendments": []}
        if isinstance(self.was, Earlier):
            given |= {name: getattr(self.was, name) for name in self.was.model_fields_set}
        if self.added:
            given["records"] = then.records.without(self.added)
        return then.model_copy(update=given)


class Claim(Strict):
    """One entry of the ledger. headline: of the paper's title or abstract. Without a paper it is the book's
    own. since: the day of the present rule. seen: what was known of its figures before that."""

    id: Annotated[str, Field(pattern="^[a-z0-9-]+$")]
    paper: Text | None = None
    headline: bool = False
    claim: Text
    reported: Reported | None = None
    since: date
    seen: Text | None = None
    records: Source
    measure: Measure
    provided: list[Condition] = Field(default_factory=list)
    rule: Rule
    amendments: list[Amendment] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> Claim:
        for text, wrong in {**_of_the_paper(self), **_of_the_rule(self), **_of_the_settings(self)}.items():
            if wrong:
                raise ValueError(f"claim {self.id}: {text}")
        return self

    def former(self) -> list[tuple[Amendment, Former | Claim]]:
        """Every amendment with the rule that it replaced; one on an interval as the claim that it made."""
        found: list[tuple[Amendment, Former | Claim]] = []
        then = self
        for change in reversed(self.amendments):
            then = change.before(then)
            found.insert(0, (change, change.was if isinstance(change.was, Former) else then))
        return found


def _of_the_paper(claim: Claim) -> dict[str, bool]:
    known, reported = papers.available(), claim.reported
    if reported is None:
        return {"a paper's claim needs what it reported": claim.paper is not None}
    return {
        f"paper {claim.paper!r} is none of {known}": claim.paper not in known,
        "reported needs value and unit, or text": reported.text is None
        and None in (reported.value, reported.unit),
        "a figure marked V or V-calc needs its source": reported.mark != "M" and reported.source is None,
    }


def _of_the_rule(claim: Claim) -> dict[str, bool]:
    measure, dates = claim.measure, [amendment.date for amendment in claim.amendments]
    compared = (claim.records.versus is not None) + (measure.minus is not None)
    return {
        "partly must not ask for more than reproduced": claim.rule.partly > claim.rule.reproduced,
        "compare with versus or with minus, not with both": compared == 2,
        "the range over a parameter needs records.versus": measure.over is not None
        and claim.records.versus is None,
        "amendments go from the first to the last, which is the day of the present rule": dates
        != sorted(dates)
        or claim.since != (dates or [claim.since])[-1],
        "an amendment says what the rule was, or which conditions were added": any(
            bool(one.was and one.was.model_fields_set) == bool(one.added) for one in claim.amendments
        ),
    }


def _of_the_settings(claim: Claim) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for one in claim.records.settings:
        open_ = [name for name in SETTING if name not in one]
        several = [n for n, v in one.items() if isinstance(v, list) != (n == claim.measure.over)]
        found[f"the setting must fix {', '.join(open_)}"] = bool(open_)
        found[f"{', '.join(several)}: one value each, a list for the measure's `over` alone"] = bool(several)
        paper_scale = claim.paper is None or one.get("profile") == "full"
        found["a paper's claim is judged at profile full"] = not paper_scale
    return found


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


def load_claims(path: str | Path = BOOK / "claims.yml") -> list[Claim]:
    """Read and check the ledger. Raises DataError naming the claim and what is wrong with it."""
    try:
        ledger = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise DataError(f"cannot read the ledger of claims: {problem}") from problem
    except yaml.YAMLError as problem:
        raise DataError(f"{path} is not YAML: {problem}") from problem
    return validate(Ledger, ledger, str(path)).claims
