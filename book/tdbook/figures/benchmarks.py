"""The benchmark page's picture: every measured ratio with its spread and its target."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt

from tdbook import style

#: By whether the target is met; None: there is no target.
VERDICT = {True: style.GREEN, False: style.RED, None: style.BLUE}


def svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of the rows that were measured, one panel per topic; the same text for the same rows."""
    measured = [row for row in rows if row["ratio"] is not None]
    if not measured:
        return '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
    topics = list(dict.fromkeys(row["topic"] for row in measured))
    heights = [sum(row["topic"] == topic for row in measured) for topic in topics]
    with plt.rc_context({"svg.hashsalt": "tdlib", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(
            len(topics), 1, figsize=(8.5, 0.24 * sum(heights) + 0.9 * len(topics)), squeeze=False,
            height_ratios=heights, layout="constrained",
        )  # fmt: skip
        for topic, ax in zip(topics, axes[:, 0], strict=True):
            _panel(ax, topic, [row for row in measured if row["topic"] == topic])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    return buffer.getvalue()


def _panel(ax: Any, topic: str, rows: Sequence[Mapping[str, Any]]) -> None:
    for place, row in enumerate(rows):
        low, high = row["quartiles"]
        color = VERDICT[row["met"]]
        ax.plot([low, high], [place, place], color=color, lw=4, alpha=0.35, solid_capstyle="round")
        ax.plot(row["ratio"], place, "o", color=color, ms=5)
        if row["target"] is not None:
            ax.plot(row["target"], place, "|", color="black", ms=11, mew=1.5)
    ax.axvline(1, color="0.6", lw=0.8)
    ax.set_xscale("log")
    ax.set_yticks(range(len(rows)), [f"{row['name']} | {row['b']}" for row in rows], fontsize=7)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_title(f"{topic}: ratio of times", fontsize=9, loc="left")
    ax.grid(axis="x", which="major", alpha=0.4)
    ax.tick_params(axis="x", labelsize=8)
