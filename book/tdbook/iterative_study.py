"""What the chapter on iterative decomposition needs beside the method: its opponent, the road that accuracy
takes over the epochs, and the words about its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from torch import nn

import tdlib
from tdbook import papers, style
from tdlib.planning import Plan
from tdlib.train import reestimate_batchnorm

Tables = Mapping[str, Sequence[Mapping[str, Any]]]


def named(least: int | None) -> str:
    """The iteration's name: ranks below the authors' lowest (None: theirs) make it a method of ours."""
    return "iterative" if least is None else "iterative, lower ranks"


def at_once(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    seed: int = 0,
    device: Any = None,
    on_decomposed: Callable[[nn.Module], None] = lambda network: None,
) -> tuple[nn.Module, dict[str, list[dict[str, Any]]]]:
    """One decomposition, BatchNorm re-estimated as `iterative` does it: ready for fine-tuning.

    on_decomposed: called with the network before BatchNorm is touched.
    """
    small = tdlib.decompose(model, plan, progress=False)
    on_decomposed(small)
    reestimate_batchnorm(small, data, device, seed=seed)
    return small, {}


def road(method: str, tables: Tables, start: float | None = None) -> pd.DataFrame:
    """Validation accuracy over all epochs of fine-tuning: columns method, epochs (done so far), accuracy, and
    state, "decomposed" or "fine-tuned".

    tables: of `iterative`, or of one decomposition at accuracy `start` with its fine-tuning.
    """
    first = [{"pass": None, "group": None, "val_before": start}]
    rows, done = [], 0
    for step in tables.get("stages", first):
        rows.append({"epochs": done, "accuracy": step["val_before"], "state": "decomposed"})
        for epoch in tables["finetune"]:
            if (epoch.get("pass"), epoch.get("group")) == (step["pass"], step["group"]):
                done += 1
                rows.append({"epochs": done, "accuracy": epoch["val_accuracy"], "state": "fine-tuned"})
    return pd.DataFrame(rows).assign(method=method)


def last_cut(stages: Sequence[Mapping[str, Any]], ratio: float, seed: int) -> str:
    """Between which ratios the last decomposition of the iteration to `ratio` lies, in words."""
    before, after = stages[-2]["ratio"] if len(stages) > 1 else 1.0, stages[-1]["ratio"]
    return (
        f"In the iteration to {ratio:g}×, seed {seed}, the last of {len(stages)} decompositions takes the "
        f"network from {before:.2f}× to {after:.2f}×."
    )


def rules_used(ranks: Sequence[Mapping[str, Any]]) -> str:
    """Which rule gave the ranks of each pass, in words; ranks: the table of `iterative`."""
    used = pd.DataFrame(ranks).groupby("pass")["rule"].first()
    counts = ", ".join(f"{rule} in {n} of {len(used)} passes" for rule, n in used.value_counts().items())
    each = ", ".join(f"{number}: {rule}" for number, rule in used.items())
    return f"What gave the ranks: {counts} ({each})."


def against(table: pd.DataFrame, one: str, other: str) -> str:
    """One method less another in words, per ratio and over all runs, where a seed has both.

    table: columns method, ratio, by, seed, epochs, test_accuracy_recalibrated and test_accuracy (percent).
    """
    then, end = "test_accuracy_recalibrated", "test_accuracy"
    pairs = table.pivot(index=["by", "ratio", "seed"], columns="method", values=[then, end, "epochs"])
    pairs = pairs.loc[:, pairs.columns.get_level_values(1).isin([one, other])].dropna()
    a, b = (pairs.xs(name, axis=1, level=1).astype(float) for name in (one, other))
    found = []
    for (by, ratio), gap in (a - b).groupby(["by", "ratio"]):
        mine, theirs = a.loc[by, ratio].mean(), b.loc[by, ratio].mean()
        shown = ", ".join(f"{x:+.2f}" for x in gap[end])
        found.append(
            f"- **{ratio:g}×** {style.UNITS[by]}: after the last decomposition, BatchNorm re-estimated, "
            f"*{one}* has {mine[then]:.1f} % and *{other}* {theirs[then]:.1f} %, "
            f"{gap[then].mean():+.1f} points; "
            f"at the end, after {mine['epochs']:.3g} and {theirs['epochs']:.3g} epochs, {mine[end]:.1f} % "
            f"and {theirs[end]:.1f} %, {gap[end].mean():+.2f} points (by seed: {shown})."
        )
    counts = [
        f"{int((a[when] > b[when]).sum())} of {len(pairs)} runs {text}"
        for when, text in ((then, "after the last decomposition"), (end, "at the end"))
    ]
    return "\n".join(
        [*found, f"\n*{one}* is ahead of *{other}* in {' and in '.join(counts)}."]
    )


def reported() -> str:
    """What the authors' own comparison says, in words."""
    table = papers.table("musco", "iterative")
    gain = table["iterative"] - table["one_shot"]
    spans = f"{gain.min():+.2f} to {gain.max():+.2f} points"
    metrics = " and ".join(dict.fromkeys(table["metric"]))
    return (
        f"In the authors' table the iteration less one-shot is {spans} ({metrics}), above zero on "
        f"{int((gain > 0).sum())} of {len(gain)} networks. The source does not say how many epochs either "
        "had."
    )
