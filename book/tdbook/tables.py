"""Markdown tables of pages and notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd


def markdown(rows: pd.DataFrame | Iterable[Mapping[str, Any]]) -> str:
    """Rows as a markdown table: columns in order of appearance, four digits, a dash for what is missing."""
    frame = pd.DataFrame(rows if isinstance(rows, pd.DataFrame) else list(rows), dtype=object)
    return frame.map(_cell).to_markdown(index=False, stralign=None, disable_numparse=True)


def _cell(value: Any) -> str:
    if value is None or value == "" or value != value:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
