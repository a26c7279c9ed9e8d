"""Markdown tables of the generated pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def markdown_table(rows: Iterable[dict[str, Any]]) -> str:
    """A markdown table of dicts; columns in the order of first appearance, missing values as a dash."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(column)) for column in columns) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None or value == "" or value != value:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
