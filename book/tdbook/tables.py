"""Markdown tables of pages and notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

#: Columns of `tdbook.experiment` in every chapter's main table, and their headings.
COLUMNS = {
    "test_accuracy_before": "decomposed (%)", "test_accuracy_recalibrated": "+ BatchNorm (%)",
    "test_accuracy_epoch": "+ 1 epoch (%)", "test_accuracy": "at the end (%)", "params_ratio": "params ×",
    "macs_ratio": "MACs ×", "speedup": "speed-up ×", "epochs": "epochs", "seconds": "seconds",
}  # fmt: skip


def markdown(rows: pd.DataFrame | Iterable[Mapping[str, Any]]) -> str:
    """Rows as a markdown table: columns in order of appearance, four digits, a dash for what is missing."""
    frame = pd.DataFrame(rows if isinstance(rows, pd.DataFrame) else list(rows), dtype=object)
    lines = [map(str, frame.columns), *frame.map(_cell).itertuples(index=False)] if len(frame.columns) else []
    head, *body = [f"| {' | '.join(line)} |" for line in lines] or [""]
    return "\n".join([head, f"|{'---|' * len(frame.columns)}", *body]) if head else ""


def _cell(value: Any) -> str:
    if value is None or value == "" or value != value:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def accuracy(frame: pd.DataFrame) -> str:
    """What heads a column of accuracies: says on which images where records' `measured_on` names others than
    test images."""
    others = frame["measured_on"].dropna().unique() if "measured_on" in frame else []
    return f"accuracy{' on '.join(['', *others])} (%)"


def summary(
    frame: pd.DataFrame, keys: Sequence[str], values: Mapping[str, str] | Sequence[str], digits: int = 2
) -> pd.DataFrame:
    """Each group of `keys` as a row, named by them: mean ± standard deviation over its rows (the mean alone
    of one row), a dash where nothing was measured, and `n`, the number of rows.

    values: columns, or column -> heading. Columns and keys that the frame lacks are left out. In a frame of
    `records` a metric (`metric_NAME`) goes before the parameter of its name.
    """
    headings = dict(values) if isinstance(values, Mapping) else {name: name for name in values}
    frame = frame.assign(**{n: frame[f"metric_{n}"] for n in headings if f"metric_{n}" in frame.columns})
    shown = [name for name in headings if name in frame.columns]
    groups = frame.groupby([key for key in keys if key in frame.columns], sort=False, dropna=False)

    def cell(column: pd.Series) -> str:
        column = column.dropna()
        if column.empty:
            return "–"
        spread = f" ± {column.std():.{digits}f}" if len(column) > 1 else ""
        return f"{column.mean():.{digits}f}{spread}"

    table = groups[shown].agg(cell).rename(columns=headings)
    table["n"] = groups.size()
    return table
