"""The ledger is well formed and refuses what would mix settings; unverified figures say so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from tdbook import claims, former, papers, status, verdicts
from tdbook.records import parameter_hash
from tdlib.errors import DataError, UnknownName

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "book" / "claims.yml"

SETTING = {"dataset": "d", "model": "m", "format": "tt", "ratio": 2.0, "by": "params", "profile": "full"}
ENTRY = {
    "id": "x", "paper": "admm-tt", "claim": "something", "since": "2026-11-21",
    "reported": {"value": 1.0, "unit": "points", "mark": "M"},
    "records": {"chapter": "c", "where": {"method": "admm", **SETTING}},
    "measure": {"metric": "acc", "minus": "dense"}, "rule": {"reproduced": 1.0, "partly": 0.0},
}  # fmt: skip
WAS = {
    "records": {"chapter": "c", "where": {"method": "admm"}},
    "measure": {"kind": "margin", "metric": "acc", "minus": "dense"},
    "rule": {"reproduced": 1.0, "partly": 0.0, "seeds": 3},
}


def written(path: Path, *entries: dict) -> Path:
    """A ledger's file; the day as YAML has it."""
    text = yaml.safe_dump({"claims": list(entries)}, sort_keys=False)
    path.write_text(re.sub(r"'(\d{4}-\d\d-\d\d)'", r"\1", text))
    return path


def where(**changes: object) -> dict:
    """The records of ENTRY with another setting; None leaves a key out."""
    changed = {"method": "admm", **SETTING, **changes}
    return {"records": {"chapter": "c", "where": {k: v for k, v in changed.items() if v is not None}}}


def rule_line(claim: claims.Claim) -> str:
    """All that decides a verdict as a digest, and how often it was amended."""
    parts = {"claim", "records", "measure", "provided", "rule"}
    decides = claim.model_dump(include=parts, exclude_defaults=True)
    return f"{parameter_hash(decides)} after {len(claim.amendments)} amendments"


def amended(*days: str) -> dict:
    return {"amendments": [{"date": day, "reason": "because", "was": WAS} for day in days]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paper": "nobody"}, "paper 'nobody'"),
        ({"reported": {"mark": "V", "value": 1.0, "unit": "points"}}, "needs its source"),
        ({"reported": {"mark": "M"}}, "needs value and unit"),
        ({"reported": None}, "needs what it reported"),
        ({"rule": {"reproduced": 0.0, "partly": 1.0}}, "must not ask for more"),
        ({"measure": {"metric": "acc", "over": "ratio"}}, "needs records.versus"),
        ({"measure": {"metric": "acc", "vote": "acc"}}, "vote"),
        ({"verdict": "reproduced"}, "verdict"),
        (where(ratio=None), "must fix ratio"),
        (where(dataset=None, model=None), "must fix dataset, model"),
        (where(ratio=[2.0, 4.0]), "ratio: one value each"),
        (where(dataset=["a", "b"]), "dataset: one value each"),
        (where(profile="reduced"), "judged at profile full"),
        (amended("2026-11-20"), "the day of the present rule"),
        ({"amendments": [{"date": "2026-11-21", "reason": "so", "was": {}}]}, "what the rule was"),
        (amended("2026-11-22", "2026-11-21"), "from the first to the last"),
    ],
)
def test_wrong_ledgers_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    entry = {k: v for k, v in {**ENTRY, **change}.items() if v is not None}
    with pytest.raises(DataError, match=message):
        claims.load_claims(written(tmp_path / "claims.yml", entry))


def test_a_ledger_is_read_with_its_settings_and_amendments(tmp_path: Path) -> None:
    entry = ENTRY | amended("2026-11-20", "2026-11-21")
    entry["records"] = {**entry["records"], "each": [{"ratio": 2.0}, {"ratio": 4.0}]}
    own = {k: v for k, v in ENTRY.items() if k not in ("paper", "reported")} | {"id": "own"}
    first, second = claims.load_claims(
        written(tmp_path / "claims.yml", entry, own | where(profile="reduced"))
    )
    assert [one["ratio"] for one in first.records.settings] == [2.0, 4.0]
    assert [one.date.day for one in first.amendments] == [20, 21] and second.paper is None


def test_a_repeated_id_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="twice"):
        claims.load_claims(written(tmp_path / "claims.yml", ENTRY, ENTRY))
    with pytest.raises(DataError, match="cannot read"):
        claims.load_claims(tmp_path / "none.yml")


def test_without_records_every_setting_of_the_ledger_is_not_run_yet() -> None:
    ledger = claims.load_claims(LEDGER)
    found = verdicts.judge_all(ledger, [])
    assert {one.verdict for one in found} == {"not run yet"} and "verdict" not in claims.Claim.model_fields
    assert len(found) == sum(len(claim.records.settings) for claim in ledger)


def test_every_claim_is_shown_those_of_abstracts_first_and_marks_unverified_figures() -> None:
    ledger = claims.load_claims(LEDGER)
    text = status.markdown(verdicts.judge_all(ledger, []))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for entry in ledger:
        (row,) = [line for line in rows if f"| {entry.claim}<br>" in line]
        assert ("unverified" in row) == (entry.reported is not None and entry.reported.mark == "M")
        assert "**not run yet**" in row
    order = [
        text.index(f"| {e.claim}<br>") for e in sorted(ledger, key=lambda e: (not e.headline, not e.paper))
    ]
    assert order == sorted(order)


def test_no_rule_changes_without_an_amendment() -> None:
    """Where this fails: state the rule that was in an amendment, with its reason; then put the line that the
    message shows into rules.yml."""
    known = yaml.safe_load((Path(__file__).parent / "rules.yml").read_text(encoding="utf-8"))
    found = {claim.id: rule_line(claim) for claim in claims.load_claims(LEDGER)}
    assert found == known


@pytest.mark.parametrize(
    "change", [{"recipe": {"rho": 0.01}}, {"where": {"limit": 100}}, {"versus": {"method": "direct"}}]
)
def test_the_digest_of_a_rule_depends_on_its_conditions(change: dict) -> None:
    claim = claims.load_claims(LEDGER)[0]
    changed = claim.model_copy(update={"records": claim.records.model_copy(update=change)})
    assert rule_line(changed) != rule_line(claim)
    assert rule_line(claim.model_copy(update={"claim": "another"})) != rule_line(claim)


def test_every_old_rule_of_the_ledger_is_kept_with_the_reason_of_its_end() -> None:
    found = status.amendments(verdicts.judge_all(claims.load_claims(LEDGER), [])).splitlines()
    changes = [change for claim in claims.load_claims(LEDGER) for change in claim.amendments]
    reasons = list(dict.fromkeys(f"- {change.date}: {change.reason.strip()}" for change in changes))
    assert [line for line in found if line.startswith("- ")] == reasons
    assert len(found) == len(reasons) + len(changes) > 0


def test_the_differences_that_the_iterative_paper_reports_are_those_of_its_table() -> None:
    (entry,) = (claim for claim in claims.load_claims(LEDGER) if claim.id == "iterative-beats-one-shot")
    table = papers.table("musco", "iterative")
    gains = table["iterative"] - table["one_shot"]
    assert entry.reported.text.startswith(f"{gains.min():.2f} to {gains.max():.2f} points")


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([1.5, 1.2, 0.9], "reproduced"),
        ([1.5, 1.2], "partly"),  # fewer seeds than the rule asked for
        ([0.5, 0.2, 0.4], "partly"),
        ([-0.5, 0.2, 0.1], "not reproduced"),
        ([], "not run yet"),
    ],
)
def test_former_rules_judge_as_they_did(gains: list[float], verdict: str) -> None:
    runs = [
        {"chapter": "c", "parameters": {"method": "admm", "seed": s}, "metrics": {"acc": 60 + a, "dense": 60}}
        for s, a in enumerate(gains)
    ]
    found = former.judge(former.Former.model_validate(WAS), runs)
    assert (found.verdict, found.seeds) == (verdict, len(gains))
    assert found.mean == (pytest.approx(sum(gains) / len(gains)) if gains else None)


def test_former_pairs_and_ranges_are_those_of_their_seed() -> None:
    runs = [
        {"chapter": "c", "parameters": {"method": m, "ratio": r, "seed": s}, "metrics": {"acc": a}}
        for m, r, s, a in [
            ("admm", 2.0, 0, 60.0), ("admm", 4.0, 0, 50.0), ("admm", 2.0, 1, 99.0),
            ("direct", 2.0, 0, 58.0), ("direct", 4.0, 0, 49.0), ("direct", 8.0, 0, 1.0),
        ]
    ]  # fmt: skip
    for measure, mean in (
        ({"kind": "paired", "metric": "acc", "per": ["ratio"]}, 1.5),
        ({"kind": "spread", "metric": "acc", "over": "ratio"}, -1.0),
    ):
        records = {"chapter": "c", "where": {"method": "admm"}, "versus": {"method": "direct"}}
        was = former.Former.model_validate(WAS | {"records": records, "measure": measure})
        assert former.judge(was, runs).mean == pytest.approx(mean)


def test_papers_print_their_marks() -> None:
    frame = papers.table("admm-tt", "gains")
    assert frame.set_index("network").loc["ResNet-20", "gain"] == 1.96
    assert papers.show(2.3, "V", "×") == "2.3×"
    assert papers.show(67.36, "M", "%") == "67.36 % reported (unverified)"
    text = papers.markdown("admm-tt", "cifar100")
    marks = papers.table("admm-tt", "cifar100")
    unverified = (marks[["top1_mark", "ratio_mark"]] == "M").to_numpy().sum()
    assert len(re.findall("unverified", text)) == unverified
    with pytest.raises(UnknownName, match="cifar10"):
        papers.table("admm-tt", "cifar1000")
    with pytest.raises(UnknownName, match="admm-tt"):
        papers.load("adm-tt")


def test_differences_from_a_paper_are_a_table_with_how_the_authors_way_is_known(monkeypatch):
    row = {
        "point": "order",
        "authors": "forwards",
        "mark": "M",
        "here": "backwards",
        "why": "speed",
        "effect": "none",
    }
    paper = papers.load("musco").model_copy(update={"differences": [papers.Difference(**row)]})
    monkeypatch.setattr(papers, "load", lambda key: paper)
    assert "forwards (unverified)" in papers.differences("musco")
    with pytest.raises(ValidationError):
        papers.Difference(**row | {"effect": ""})


@pytest.mark.parametrize("key", papers.available())
def test_every_paper_has_a_bibliography_key_and_printable_tables(key: str) -> None:
    paper = papers.load(key)
    assert re.fullmatch(r"[a-z]+\d{4}\w+", paper.cite)
    for name in paper.tables:
        assert papers.markdown(key, name).startswith("*")
