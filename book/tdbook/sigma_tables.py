"""Tables of the chapter on distribution-aware decomposition, and sentences on what they hold."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from tdbook import style
from tdbook.tables import accuracy, summary
from tdbook.verdicts import interval, spelt

#: The arms in the order of the story.
STEPS = ("frobenius", "sigma", "transfer", "source", "global", "sequential", "bias", "batchnorm")

#: Metrics of which the better one counts, as in the ledger.
BEST = ("test_accuracy_before", "test_accuracy_recalibrated")


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows by rising ratio and in the order of the story, methods as the text writes them; statistics of
    another data set (column `calibration`) by its name."""
    place = frame["method"].map({step: k for k, step in enumerate(STEPS)})
    ordered = frame.assign(place=place).sort_values(["ratio", "place"], kind="stable").drop(columns="place")
    method = ordered["method"].map(style.label)
    if "calibration" in ordered:
        method = method.where(ordered["calibration"].isna(), "Σ of " + ordered["calibration"].astype(str))
    return ordered.assign(method=method)


def over_ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy, agreement and KL divergence over the ratios, a row per method in the order of the frame."""
    shown = {"test_accuracy": accuracy(frame), "agreement": "agreement (%)", "kl": "KL"}
    means = summary(frame, ["method", "ratio"], shown).reset_index()
    table = means.pivot(index="method", columns="ratio", values=list(shown.values())).fillna("–")
    table = table.reindex(frame["method"].unique()).rename(columns="{:g}×".format, level="ratio")
    return table.rename_axis(index=None, columns=[None, None])


def heading(group: pd.DataFrame) -> str:
    """What a group of records of one network has in common, with the 95 % interval of an accuracy."""
    first, images = group.iloc[0], int(group["n"].min())
    dense = group["dense_test_accuracy"].mean()
    chance = 1.96 * (dense * (100 - dense) / images) ** 0.5
    where = ", ".join(first[["dataset", "model", "format"]])
    tested = "test images" if pd.isna(first.get("measured_on")) else "training images"
    return (
        f"**{where}, ratio in {first['by']} of the {first['of']}**: dense {dense:.2f} %; {images:,} {tested} "
        f"measured (±{chance:.1f} points by their choice alone), {group['samples'].max():,} calibrate"
    )


def margins(frame: pd.DataFrame, against: str) -> pd.DataFrame:
    """Each method less the method `against` at equal ratio and seed, in points, with the 95 % interval over
    seeds where there are several: as is, the better of as is and with BatchNorm re-estimated on each side,
    and, where it was measured, after one epoch of fine-tuning. Rows as in `named`."""
    rows = []
    for (ratio, method), group in frame.groupby(["ratio", "method"], sort=False):
        if method == against:
            continue
        other = frame[(frame["ratio"] == ratio) & (frame["method"] == against)]
        ours, theirs = (side.set_index("seed") for side in (group, other))
        best, over = (side[side[list(BEST)].mean().idxmax()] for side in (ours, theirs))
        differences = {
            "as is": ours[BEST[0]] - theirs[BEST[0]],
            "the better of as is and BatchNorm": best - over,
        }
        if "test_accuracy_epoch" in frame:
            differences["after one epoch"] = ours["test_accuracy_epoch"] - theirs["test_accuracy_epoch"]
        row = {"ratio": f"{ratio:g}×", f"less “{against}”": method}
        for name, values in differences.items():
            found = values.dropna().tolist()
            row[name] = spelt(sum(found) / len(found), interval(found), "points") if found else "–"
        rows.append(row | {"draws": len(differences["as is"].dropna())})
    return pd.DataFrame(rows)


def energy(statistics: Mapping[str, Tensor], share: float = 0.99) -> str:
    """How few directions of the layers' inputs hold this share of their energy, in words."""
    parts = {}
    for name, sigma in statistics.items():
        values = torch.linalg.eigvalsh(sigma).flip(0).clamp_min(0).cumsum(0)
        parts[name] = (int((values < share * values[-1]).sum()) + 1) / len(values)
    few, many = min(parts, key=parts.__getitem__), max(parts, key=parts.__getitem__)
    return (
        f"{100 * share:g} % of the energy lies in {100 * parts[few]:.0f} % of the directions in `{few}`, the "
        f"layer with the fewest, and in {100 * parts[many]:.0f} % in `{many}`, the layer with the most."
    )


def truth(single: pd.DataFrame) -> str:
    """Which error of `sigma.single_layers` puts the harm in order, and what the Σ norm chose, in words."""
    wide = single.assign(ranks=single["ranks"].astype(str)).pivot_table(
        index=["layer", "ranks"], columns="method", values=["frobenius_error", "sigma_error", "kl"]
    )
    kernel, output, harm = (
        wide[name]["sigma"] - wide[name]["frobenius"] for name in ("frobenius_error", "sigma_error", "kl")
    )
    order = single[["frobenius_error", "sigma_error", "kl"]].corr("spearman")["kl"]
    by_output, by_kernel = order["sigma_error"], order["frobenius_error"]
    closer = int((harm < 0).sum())
    better = "better than" if by_output > by_kernel else "no better than"
    return (
        f"In {int((kernel > 0).sum())} of {len(wide)} cases the kernel chosen under Σ is further from the "
        f"original than the plain one; the layer's output is nearer in {int((output < 0).sum())}, the "
        f"network's (KL) in {closer}. The error of the output orders the harm {better} that of "
        f"the kernel: rank correlation {by_output:.2f} against {by_kernel:.2f}."
    )
