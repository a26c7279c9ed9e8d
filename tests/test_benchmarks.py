"""The benchmarks' own logic: verdicts, bookkeeping, inputs. Nothing here is about how fast anything is."""

import json

import pytest
import torch

from benchmarks import kernels, report, timing
from benchmarks.__main__ import RESULTS, TOPICS
from benchmarks.decomposition import sweeps_to
from tdlib.decompositions import cp_als, cp_compose


def row(ratio=2.0, **options):
    made = timing.Row("t", "n", "tdlib", "peer", **options)
    made.ratio, made.quartiles, made.pairs = ratio, (ratio, ratio), 3
    return made


@pytest.mark.parametrize(
    ("options", "met"),
    [
        ({}, None),
        ({"target": 2.0}, True),
        ({"target": 2.1}, False),
        ({"target": 2.1, "at_most": True}, True),
        ({"target": 1.0, "error_a": 0.1, "error_b": 0.1}, True),
        ({"target": 1.0, "error_a": 0.2, "error_b": 0.1}, False),
    ],
)
def test_a_target_counts_only_at_no_larger_error(options, met):
    assert row(**options).met is met
    assert row(float("nan"), **options).met is None


def test_pairs_give_the_median_of_their_ratios():
    filled = timing.fill(timing.Row("t", "n", "a", "b"), [1.0, 2.0, 4.0], [2.0, 6.0, 4.0])
    assert filled.ratio == 2.0 and filled.pairs == 3
    assert filled.quartiles[0] <= 2.0 <= filled.quartiles[1]
    assert timing.invert(row(4.0)).ratio == 0.25


def test_measure_alternates_and_reads_the_errors_from_the_runs():
    order = []
    errors = (lambda found: found, lambda found: found * 2)
    made = timing.measure(
        timing.Row("t", "n", "a", "b"),
        lambda: order.append("a") or 0.5,
        lambda: order.append("b") or 0.5,
        pairs=4, errors=errors, warm=False,
    )  # fmt: skip
    assert "".join(order) == "abbaabba" and made.pairs == 4
    assert (made.error_a, made.error_b) == (0.5, 1.0)


def test_new_rows_replace_their_topic_and_leave_the_others(tmp_path):
    path = tmp_path / "results.json"
    first = report.merge(path, [row()], {"cpu": "one"})
    report.write(path, first)
    other = timing.Row("u", "n", "a", "b")
    found = report.merge(path, [other], {"cpu": "two"})
    assert [r["topic"] for r in found["rows"]] == ["t", "u"] and found["machines"]["t"] == {"cpu": "one"}
    assert report.merge(path, [row(3.0)], {"cpu": "new"})["rows"][0]["ratio"] == 3.0
    json.dumps(found, allow_nan=False)
    assert "targets met" in report.summary([row(target=3.0)]) and "n" in report.line(other)


def test_kernels_have_the_spectrum_they_claim():
    W = kernels.decaying_kernel(48, 32)
    s = torch.linalg.svdvals(W.reshape(48, -1).double())
    slope = (s[31].log() - s[1].log()) / torch.tensor(32 / 2).log()
    assert float(slope) == pytest.approx(-kernels.EXPONENT, abs=0.25)
    assert float(W.std()) == pytest.approx((2 / (32 * 9)) ** 0.5, rel=1e-4)
    assert torch.equal(W, kernels.decaying_kernel(48, 32))


def test_cp_is_stopped_at_the_peers_error():
    T = kernels.decaying_kernel(16, 16).flatten(2)
    sweeps = sweeps_to(T, 6, 0.8)
    errors = [
        kernels.relative_error(T, cp_compose(cp_als(T, 6, sweeps=n, tol=0.0)))
        for n in (sweeps, sweeps - 1)
        if n
    ]
    assert errors[0] <= 0.8 + 1e-5 and all(error > 0.8 - 1e-5 for error in errors[1:])


def test_the_committed_results_are_of_full_runs_and_on_the_page():
    from tdbook import pages

    results = json.loads(RESULTS.read_text())
    assert set(results["machines"]) <= set(TOPICS) and not any(
        m["quick"] for m in results["machines"].values()
    )
    text = pages.benchmarks()
    for made in results["rows"]:
        assert made["name"] in text
        assert made["met"] == timing.Row(**{k: v for k, v in made.items() if k != "met"}).met
