"""Verdicts follow from intervals over seeds; what is unsure, mixed or reduced carries none."""

from __future__ import annotations

from datetime import date

import numpy as np
import pytest

from tdbook import status, verdicts
from tdbook.claims import Claim

DAY = date(2026, 11, 21)
SETTING = {"dataset": "cifar10", "model": "resnet20", "format": "tt", "ratio": 2.0, "by": "params"}
TRACED = {"schema": 2, "git": {"commit": "a" * 40, "dirty": False}, "start": "c" * 64, "data": "d" * 64}
ORDER = [verdicts.NOT_REPRODUCED, verdicts.INCONCLUSIVE, verdicts.PARTLY, verdicts.REPRODUCED]


def run(seed: int, accuracy: float | None = None, method: str = "ours", **more) -> dict:
    """A record; more: parameters that SETTING has, what a record has beside, else metrics."""
    setting = {
        **SETTING,
        "profile": "full",
        **{k: more.pop(k) for k in [*SETTING, "profile", "lr", "rho"] if k in more},
    }
    about = {k: more.pop(k) for k in (*TRACED, "created", "settings", "scale") if k in more}
    metrics = {"labels": True, "n": 1000, **more} | ({} if accuracy is None else {"acc": accuracy})
    scale = "reduced: less" if setting["profile"] == "reduced" else setting["profile"]
    return {"chapter": "c", "parameters": {**setting, "method": method, "seed": seed}, "metrics": metrics,
            "scale": scale, "created": "2026-11-22T00:00:00Z", **TRACED, **about}  # fmt: skip


def claim(versus: str | None = "theirs", *, ratio: object = 2.0, each: list | None = None, **more) -> Claim:
    source = {"chapter": "c", "where": {**SETTING, "method": "ours", "ratio": ratio, "profile": "full"}}
    source |= {"versus": {"method": versus}} if versus else {}
    source |= {"each": each} if each else {}
    return Claim.model_validate({
        "id": "x", "paper": "admm-tt", "claim": "something", "since": DAY, "records": source,
        "reported": {"text": "so", "mark": "M"}, "measure": {"metric": "acc"},
        "rule": {"reproduced": 1.0, "partly": 0.0}, **more,
    })  # fmt: skip


def pairs(gains, base: float = 60.0, **more) -> list[dict]:
    """Both arms, a seed for each gain."""
    ours = [run(seed, base + gain, **more) for seed, gain in enumerate(gains)]
    return ours + [run(seed, base, "theirs", **more) for seed in range(len(gains))]


def one(entry: Claim, runs: list[dict], old: list[dict] | None = None) -> verdicts.Verdict:
    (found,) = verdicts.judge(entry, runs, old or [])
    return found


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([1.5, 1.6, 1.4], "reproduced"),
        ([0.5, 0.4, 0.6], "partly"),
        ([-0.5, -0.4, -0.6], "not reproduced"),
        ([1.5, -0.5, 0.6], "inconclusive"),  # the interval holds both thresholds
        ([0.1, -0.1, 0.0], "inconclusive"),  # it holds the lower one
        ([0.9, 1.0, 1.1], "partly"),  # it holds the upper one
        ([50.0, 50.0], "inconclusive"),  # fewer than three seeds, however large and equal the effect
        ([50.0], "inconclusive"),
        ([], "not run yet"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(gains, verdict):
    found = one(claim(), pairs(gains))
    assert found.verdict == verdict and found.found.seeds == len(gains)
    if gains:
        assert found.found.mean == pytest.approx(np.mean(gains)) and found.found.ours["acc"] > 0
        assert (found.found.interval is None) == (len(gains) == 1)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(seeds):
    draws = np.random.default_rng(seeds).normal(1.0, 2.0, (1000, seeds))
    found = [verdicts.interval(list(row)) for row in draws]
    assert np.mean([low <= 1.0 <= high for low, high in found]) == pytest.approx(0.95, abs=0.02)


def test_the_sampling_error_of_the_test_set_covers_too():
    rng, n, true = np.random.default_rng(0), 500, (0.8, 0.7)
    covered = []
    for a, b in zip(*(rng.binomial(n, p, 600) * 100 / n for p in true), strict=True):
        runs = pairs([a - b] * 3, base=b, n=n, labels=False)  # the same in every draw of calibration images
        low, high = one(claim(), runs).found.interval
        covered.append(low <= 10.0 <= high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_a_test_set_adds_to_the_interval_only_where_nothing_was_trained():
    width = {
        labels: np.diff(one(claim(), pairs([1.0, 1.2, 1.1], labels=labels)).found.interval)[0]
        for labels in (True, False)
    }
    assert width[False] > width[True]
    nameless = [r | {"metrics": {"acc": r["metrics"]["acc"]}} for r in pairs([5.0, 5.0])]
    found = one(claim(), nameless)
    assert found.verdict == "inconclusive" and "how many images" in found.found.why[0]


def test_verdicts_only_rise_when_our_side_gets_better():
    rng = np.random.default_rng(1)
    for _ in range(25):
        gains = rng.normal(-2, rng.uniform(0.1, 1.5), rng.integers(3, 6))
        ranks = [ORDER.index(one(claim(), pairs(gains + shift)).verdict) for shift in np.linspace(0, 5, 16)]
        assert ranks == sorted(ranks)


def test_seeds_are_paired_and_only_those_that_both_sides_have():
    runs = [run(0, 60.0), run(1, 70.0), run(2, 99.0), run(0, 58.0, "theirs"), run(1, 68.0, "theirs")]
    found = one(claim(), runs).found
    assert found.seeds == 2 and found.interval == (pytest.approx(2.0), pytest.approx(2.0))
    assert found.why == ("2 of the 3 seeds that a verdict needs",)
    assert one(claim(), [run(0, 60.0), run(1, 58.0, "theirs")]).found.why == ("the two sides share no seed",)


def test_of_several_metrics_the_best_of_either_side_counts_and_all_are_shown():
    entry = claim(measure={"metric": ["asis", "fresh"]})
    runs = [run(s, asis=88.0, fresh=85.0) for s in range(2)]
    runs += [run(s, None, "theirs", asis=64.0, fresh=82.0 + s) for s in range(2)]
    found = one(entry, runs).found
    assert found.mean == pytest.approx(88.0 - 82.5)
    assert list(found.ours.items()) == [("asis", 88.0), ("fresh", 85.0)]
    assert list(found.theirs.items()) == [("fresh", 82.5), ("asis", 64.0)]
    lacking = one(entry, [run(0, asis=88.0), *runs[2:]])
    assert lacking.verdict == "inconclusive" and lacking.found.why[0] == "its records lack fresh"


def test_a_metric_can_be_compared_with_another_of_its_record_and_with_one_beside():
    entry = claim(None, measure={"metric": "acc", "minus": "dense", "beside": "sooner"})
    runs = [run(s, 61.5, dense=60.0 + s / 10, sooner=59.0) for s in range(3)]
    found = one(entry, runs).found
    assert found.mean == pytest.approx(1.4) and found.beside[0] == pytest.approx(2.5)
    assert one(entry, [run(s, 61.5, dense=60.0) for s in range(3)]).found.beside is None


def test_a_range_counts_where_all_ratios_were_run():
    entry = claim(ratio=[2, 4], measure={"metric": "acc", "over": "ratio"})
    runs = [run(s, a, m, ratio=r) for s in range(3) for m, r, a in
            [("ours", 2, 60.0), ("ours", 4, 59.0), ("theirs", 2, 60.0), ("theirs", 4, 50.0 + s)]]  # fmt: skip
    found = one(entry, [*runs, run(3, 60.0, ratio=2), run(3, 60.0, "theirs", ratio=2)]).found
    assert found.seeds == 3 and found.mean == pytest.approx(9.0 - 1.0)
    assert found.ours["acc"] == 1.0 and found.theirs["acc"] == pytest.approx(9.0)


def test_every_setting_has_a_verdict_of_its_own_and_is_never_pooled():
    entry = claim(each=[{"ratio": 2.0}, {"ratio": 4.0}])
    found = verdicts.judge(entry, pairs([2.0, 2.1, 2.2]) + pairs([-2.0, -2.1, -2.2], ratio=4.0))
    assert [v.verdict for v in found] == ["reproduced", "not reproduced"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"lr": 0.2}, "lr"),
        ({"data": "b" * 64}, "data"),
        ({"settings": {"run": {"samples": 5}}}, "run samples"),
        ({}, "two records of one run"),
    ],
)
def test_records_that_differ_in_a_setting_carry_no_verdict(other, named):
    found = one(claim(), [*pairs([2.0, 2.1, 2.2]), run(2, 99.0, **other)])
    assert found.verdict == "inconclusive" and named in found.found.why[0] and found.found.mean is None


SAME = {"epochs": 4, "settings": {"tune": {"function": "f", "precision": "no"}, "epoch": {"lr": 0.1}}}


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"start": "a" * 64}, "start"),
        ({"data": "a" * 64}, "data"),
        ({"epochs": 9}, "epochs"),
        ({"epochs": None}, "epochs"),
        ({"lr": 0.2}, "lr"),  # a parameter, which the other side lacks
        ({"settings": {"tune": {"function": "f", "precision": "bf16"}}}, "tune precision"),
        ({"settings": {"tune": {"function": "g", "more": 1}, "epoch": {"lr": 9}, "run": {"lr": 9}}}, None),
        ({"rho": 0.1}, None),  # a side's own, the claim says
    ],
)
def test_sides_that_differ_in_more_than_what_is_compared_carry_no_verdict(other, named):
    entry = claim(measure={"metric": "acc", "equal": ["epochs"], "own": ["rho"]})
    uneven = [run(s, 62.0, **SAME) for s in range(3)]
    uneven += [run(s, 60.0, "theirs", **{**SAME, **other}) for s in range(3)]
    found = one(entry, uneven)
    assert found.verdict == ("inconclusive" if named else "reproduced") and found.found.mean == 2.0
    assert found.found.why == ((f"the two sides differ in {named}",) if named else ())


def test_what_neither_side_says_is_not_shared():
    found = one(claim(measure={"metric": "acc", "equal": ["epochs"]}), pairs([2.0, 2.1, 2.2]))
    assert found.verdict == "inconclusive" and found.found.why == ("the two sides differ in epochs",)


def test_a_setting_of_one_side_can_be_its_own():
    entry = claim(measure={"metric": "acc", "own": ["tune lr"]})
    runs = [run(s, 62.0, settings={"tune": {"lr": 0.1}}) for s in range(3)]
    runs += [run(s, 60.0, "theirs", settings={"tune": {"lr": 0.2}}) for s in range(3)]
    assert one(entry, runs).verdict == "reproduced"


@pytest.mark.parametrize("ratio", [2, 4])
def test_a_range_compares_the_two_sides_at_every_ratio(ratio):
    entry = claim(ratio=[2, 4], measure={"metric": "acc", "over": "ratio", "equal": ["epochs"]})
    runs = [run(s, a, m, ratio=r, epochs=9 if (m, r) == ("ours", ratio) else 4)
            for s in range(3) for m, r, a in
            [("ours", 2, 60.0), ("ours", 4, 59.0), ("theirs", 2, 60.0), ("theirs", 4, 50.0)]]  # fmt: skip
    found = one(entry, runs)
    assert found.verdict == "inconclusive" and found.found.why == ("the two sides differ in epochs",)
    same = [r | {"metrics": r["metrics"] | {"epochs": 4}} for r in runs]
    assert one(entry, same).verdict == "reproduced"


@pytest.mark.parametrize(
    ("lack", "named"),
    [
        ({"start": None}, "network that it started from"),
        ({"schema": 1}, "older schema"),
        ({"git": {"commit": "a" * 40, "dirty": True}}, "committed code"),
        ({"git": None}, "committed code"),
        ({"scale": "quick"}, "not of its scale (quick)"),
        ({"scale": "reduced: 200 images, 1 epoch"}, "not of its scale (reduced: 200 images"),
    ],
)
def test_runs_that_cannot_be_traced_or_are_smaller_than_they_say_carry_no_verdict(lack, named):
    for runs in (pairs([2.0, 2.1, 2.2], **lack), [*pairs([2.0, 2.1, 2.2])[1:], run(0, 62.0, **lack)]):
        found = one(claim(), runs)
        assert found.verdict == "inconclusive" and any(named in why for why in found.found.why)
        assert found.found.mean == pytest.approx(2.1)  # shown all the same


def test_reduced_runs_are_shown_and_are_never_the_verdict():
    found = one(claim(), pairs([2.0, 2.1, 2.2], profile="reduced"))
    assert found.verdict == "not run yet" and found.reduced.reading == "reproduced"
    both = one(claim(), pairs([2.0, 2.1, 2.2], profile="reduced") + pairs([-2.0, -2.1, -2.2]))
    assert both.verdict == "not reproduced" and both.reduced.mean == pytest.approx(2.1)
    text = status.markdown([both])
    assert "reduced: less; 3 seeds, 1 starting network, 1,000 images measured: +2.10" in text
    assert "**not reproduced**" in text
    assert one(claim(), pairs([2.0, 2.1, 2.2], profile="quick")).reduced is None


def test_the_recipe_binds_the_verdict_and_not_the_reduced_runs_beside():
    strict = claim(amendments=[{"date": DAY, "reason": "Another rho mixed in.", "added": ["rho"]}])
    strict.records.recipe["rho"] = 0.001
    good, other = pairs([2.0, 2.1, 2.2], rho=0.001), pairs([-2.0, -2.1, -2.2], rho=0.01)
    found = one(strict, [*good, *other, *pairs([0.5, 0.6, 0.7], rho=0.04, profile="reduced")])
    assert found.verdict == "reproduced" and found.reduced.mean == pytest.approx(0.6)
    ((_, before),) = strict.former()
    assert before.records.recipe == {} and one(before, good + other).verdict == "inconclusive"


def test_a_condition_that_is_not_met_or_not_measured_leaves_the_claim_open():
    need = {"text": "they stand", "of": {"method": "theirs"}, "measure": {"metric": "acc", "minus": "dense"}}
    entry = claim(provided=[{**need, "least": -5.0}])
    runs = pairs([2.0, 2.1, 2.2])
    for dense, verdict in ((62.0, "reproduced"), (70.0, "inconclusive"), (None, "inconclusive")):
        told = [r | {"metrics": r["metrics"] | ({"dense": dense} if dense else {})} for r in runs]
        found = one(entry, told)
        assert found.verdict == verdict and bool(found.found.why) == (verdict == "inconclusive")
        assert found.found.mean == pytest.approx(2.1)


def test_a_changed_rule_is_shown_with_what_it_said_of_the_records_of_its_time():
    was = {
        "records": {"chapter": "c", "where": {"method": "ours"}, "versus": {"method": "theirs"}},
        "measure": {"kind": "paired", "metric": "acc", "per": ["profile"]},
        "rule": {"reproduced": 1.0, "partly": 0.0, "seeds": 3},
    }
    entry = claim(amendments=[{"date": DAY, "reason": "It knew no interval.", "was": was}])
    then = pairs([-1.33], profile="reduced", created=f"{DAY}T23:00:00Z")
    later = pairs([9.0, 9.0, 9.0], profile="reduced")  # no part of what that rule said
    found = one(entry, later, old=then)
    assert found.verdict == "not run yet" and found.former[0][1].verdict == "not reproduced"
    assert "not reproduced (-1.33 points, 1 of 3 seeds)" in status.markdown([found])
    reason, was = status.amendments([found]).splitlines()
    assert reason == f"- {DAY}: It knew no interval." and "Until then: not reproduced (-1.33" in was


def test_an_earlier_rule_on_an_interval_is_judged_by_its_own_records_and_bounds():
    source = {"chapter": "c", "where": {**SETTING, "method": "older", "profile": "full"},
              "each": [{"ratio": 2.0}, {"ratio": 4.0}], "versus": {"method": "theirs"}}  # fmt: skip
    strict = {"rule": {"reproduced": 9.0, "partly": 0.0}}
    changes = [{"date": DAY, "reason": "Two ratios.", "was": {"records": source}},
               {"date": DAY, "reason": "Any network.", "added": ["model"]},
               {"date": DAY, "reason": "Too strict.", "was": strict}]  # fmt: skip
    entry = claim(amendments=changes)
    then = {"created": f"{DAY}T01:00:00Z"}
    runs = pairs([2.0, 2.1, 2.2], **then) + [run(s, 50.0 + s / 9, "older", **then) for s in range(3)]
    runs += [run(s, 61.0, m, model="other", **then) for s in range(3, 5) for m in ("ours", "theirs")]
    found = one(entry, [*runs, run(3, 99.0), run(3, 0.0, "theirs")])
    (_, (first, other)), (_, (wide,)), (_, (second,)) = found.former
    assert [v.verdict for v in (first, other, second)] == ["not reproduced", "not run yet", "partly"]
    assert "differ in model" in wide.found.why[0]  # as the rule pooled them
    assert second.found.seeds == 3 and found.found.seeds == 4
    text = status.markdown([found])
    assert "by a former rule: CIFAR-10, ResNet-20, TT, 2× parameters: not reproduced (-9.89" in text
    assert "by a former rule: partly (+2.10 [+1.85; +2.35] points, 3 seeds)" in text
    listed = status.amendments([found])
    assert "Until then: partly (+2.10" in listed and "Until then, without conditions on model: " in listed


def test_a_rule_younger_than_its_runs_says_so():
    early = pairs([2.0, 2.1, 2.2], created="2026-11-20T00:00:00Z")
    found = one(claim(), early)
    assert found.verdict == "reproduced" and "older than the rule" in found.found.why[0]


def test_a_row_shows_setting_scale_numbers_both_sides_and_the_interval():
    text = status.markdown([one(claim(), pairs([2.0, 2.1, 2.2]))])
    for part in ("CIFAR-10, ResNet-20, TT, 2× parameters", "62.10 % against 60.00 %",
                 "full; 3 seeds, 1 starting network, 1,000 images measured",
                 "+2.10 [+1.85; +2.35] points", "**reproduced**"):  # fmt: skip
        assert part in text


def test_a_row_says_on_how_many_networks_it_rests_and_what_its_seeds_were():
    untrained = status.markdown([one(claim(), pairs([2.0, 2.1], labels=False, start="a"))])
    assert "2 draws, 1 starting network" in untrained
    several = pairs([2.0, 2.1], start="a") + [r | {"parameters": r["parameters"] | {"seed": 2}, "start": "b"}
                                              for r in pairs([2.2])]  # fmt: skip
    assert "3 seeds, 2 starting networks" in status.markdown([one(claim(), several)])


def test_verdicts_are_counted_by_kind_those_of_the_book_apart():
    fields = {k: v for k, v in claim().model_dump().items() if k not in ("paper", "reported")}
    ours = one(Claim.model_validate(fields), pairs([-2.0, -2.1, -2.2]))
    open_ = verdicts.judge(claim(each=[{"ratio": 2.0}, {"ratio": 4.0}]), [])
    papers, book = status.counts([one(claim(), pairs([2.0, 2.1, 2.2])), *open_, ours]).split(". ")
    assert papers.endswith(
        "in 3 settings: reproduced 1, partly 0, not reproduced 0, inconclusive 0, not run yet 2"
    )
    assert book.startswith("1 claim of the book's own in 1 setting: holds 0, holds in part 0, does not")
    assert "rule: holds from +" in status.markdown([ours])


def test_settings_that_were_not_run_share_a_row():
    entry = claim(each=[{"ratio": 2.0}, {"ratio": 4.0}, {"ratio": 8.0}])
    text = status.markdown(verdicts.judge(entry, pairs([2.0, 2.1])))
    assert len(text.splitlines()) == 2 + 2 + 2 and "4×, 8× parameters" in text


def test_the_books_own_claims_hold_or_not():
    fields = {k: v for k, v in claim().model_dump().items() if k not in ("paper", "reported")}
    full = one(Claim.model_validate({**fields, "seen": "one seed, 83 against 78"}), pairs([2.0, 2.1, 2.2]))
    text = status.markdown([full])
    assert "The book's own" in text and "**holds**" in text and "seen before: one seed, 83" in text
    where = {**SETTING, "method": "ours", "profile": "reduced"}
    fields["records"] = {**fields["records"], "where": where}
    reduced = one(Claim.model_validate(fields), pairs([2.0, 2.1, 2.2], profile="reduced"))
    assert "**reduced: holds**" in status.markdown([reduced]) and "all at reduced" in status.counts([reduced])
    assert "reduced" not in status.counts([full])
