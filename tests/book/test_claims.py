"""The ledger is well formed, its verdicts follow from records by its rules, unverified figures say so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tdbook import claims, papers
from tdlib.errors import DataError, UnknownName

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "book" / "claims.yml"


def record(seed: int, method: str = "admm", ratio: float = 2.0, **metrics: float) -> dict:
    parameters = {"dataset": "d", "method": method, "ratio": ratio, "seed": seed}
    return {"chapter": "c", "parameters": parameters, "metrics": metrics}


def claim(
    measure: dict, rule: dict | None = None, versus: dict | None = None, **where: object
) -> claims.Claim:
    source = {"chapter": "c", "where": {"method": "admm", **where}} | ({"versus": versus} if versus else {})
    return claims.Claim.model_validate({
        "id": "x", "paper": "admm-tt", "claim": "something",
        "reported": {"value": 1.0, "unit": "points", "mark": "M"},
        "records": source, "measure": measure, "rule": rule or {"reproduced": 1.0, "partly": 0.0, "seeds": 3},
    })  # fmt: skip


def plain(entry: claims.Claim) -> dict:
    return entry.model_dump(exclude_unset=True)


MARGIN = {"kind": "margin", "metric": "acc", "minus": "dense"}
PAIRED = {"kind": "paired", "metric": "acc", "per": ["ratio"]}


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([1.5, 1.2, 0.9], "reproduced"),
        ([1.5, 1.2], "partly"),  # fewer seeds than the rule asks for
        ([0.5, 0.2, 0.4], "partly"),
        ([-0.5, 0.2, 0.1], "not reproduced"),
        ([], "not run yet"),
    ],
)
def test_verdicts_of_a_margin(gains: list[float], verdict: str) -> None:
    runs = [record(seed, acc=60 + gain, dense=60.0) for seed, gain in enumerate(gains)]
    found = claims.judge(claim(MARGIN), [*runs, record(9, "direct", acc=99.0, dense=1.0)])
    assert found.verdict == verdict
    if gains:
        assert found.mean == pytest.approx(sum(gains) / len(gains))
        assert found.seeds == len(gains)


def test_pairs_are_made_within_a_seed_and_ratio() -> None:
    runs = [record(0, acc=60.0), record(0, ratio=4.0, acc=50.0), record(1, acc=99.0)]
    runs += [record(0, "direct", acc=58.0), record(0, "direct", ratio=4.0, acc=49.0)]
    found = claims.judge(claim(PAIRED, versus={"method": "direct"}), runs)
    assert (found.mean, found.seeds, found.count) == (pytest.approx(1.5), 1, 2)


def test_spread_compares_ranges_over_the_ratios_both_sides_have() -> None:
    ours = {2.0: 60.0, 4.0: 58.0, 8.0: 57.0, 16.0: 10.0}
    theirs = {2.0: 62.0, 4.0: 60.0, 8.0: 50.0}
    runs = [record(0, ratio=r, acc=a) for r, a in ours.items()]
    runs += [record(0, "direct", ratio=r, acc=a) for r, a in theirs.items()]
    measure = {"kind": "spread", "metric": "acc", "over": "ratio"}
    assert claims.judge(claim(measure, versus={"method": "direct"}), runs).mean == pytest.approx(12.0 - 3.0)


def test_a_list_in_where_means_any_of_them_and_missing_metrics_measure_nothing() -> None:
    runs = [record(0, acc=61.0, dense=60.0), record(1, ratio=3.0, acc=70.0, dense=60.0), record(2, other=1.0)]
    assert claims.judge(claim(MARGIN, ratio=[2.0, 5.0]), runs).mean == pytest.approx(1.0)
    assert claims.judge(claim({"kind": "value", "metric": "nothing"}), runs).verdict == "not run yet"


def test_the_ledger_holds_no_verdict_and_every_claim_can_be_judged() -> None:
    ledger = claims.load_claims(LEDGER)
    assert ledger and "verdict" not in claims.Claim.model_fields
    assert {found.verdict for found in claims.judge_all(ledger, [])} == {"not run yet"}


def test_status_table_has_one_row_per_claim_and_marks_unverified_figures() -> None:
    ledger = claims.load_claims(LEDGER)
    lines = claims.status_markdown(claims.judge_all(ledger, [])).splitlines()
    assert len(lines) == 2 + len(ledger)
    for line, entry in zip(lines[2:], ledger, strict=True):
        assert ("unverified" in line) == (entry.reported.mark == "M")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paper": "nobody"}, "paper 'nobody'"),
        ({"reported": {"mark": "V", "value": 1.0, "unit": "points"}}, "needs its source"),
        ({"reported": {"mark": "M"}}, "needs value and unit"),
        ({"measure": {"kind": "margin", "metric": "acc"}}, "needs minus"),
        ({"measure": PAIRED}, "needs records.versus"),
        ({"rule": {"reproduced": 0.0, "partly": 1.0, "seeds": 3}}, "must not ask for more"),
        ({"measure": {"kind": "vote", "metric": "acc"}}, "vote"),
        ({"verdict": "reproduced"}, "verdict"),
    ],
)
def test_wrong_ledgers_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump({"claims": [plain(claim(MARGIN)) | change]}))
    with pytest.raises(DataError, match=message):
        claims.load_claims(path)


def test_a_repeated_id_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump({"claims": [plain(claim(MARGIN))] * 2}))
    with pytest.raises(DataError, match="twice"):
        claims.load_claims(path)
    with pytest.raises(DataError, match="cannot read"):
        claims.load_claims(tmp_path / "none.yml")


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


@pytest.mark.parametrize("key", papers.available())
def test_every_paper_has_a_bibliography_key_and_printable_tables(key: str) -> None:
    paper = papers.load(key)
    assert re.fullmatch(r"[a-z]+\d{4}\w+", paper.cite)
    for name in paper.tables:
        assert papers.markdown(key, name).startswith("*")
