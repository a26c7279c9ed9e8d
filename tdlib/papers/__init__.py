"""What the papers report, as data: every figure with a mark that says how far it can be trusted.

One YAML file per paper lies beside this module. A figure's mark is
  V       read directly in the named source,
  V-calc  computed from figures read in the named source,
  M       recalled, not checked against the paper; shown as "reported (unverified)" and never used in a test.
Pages and notebooks quote papers through `table` and `markdown` only, so no figure is typed twice.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema
import pandas as pd
import yaml

from ..errors import DataError, unknown

__all__ = ["MARKS", "available", "load", "markdown", "show", "table"]

MARKS = {"V": "", "V-calc": " (calculated)", "M": " reported (unverified)"}

_CELL = {
    "type": "object",
    "required": ["value", "mark"],
    "additionalProperties": False,
    "properties": {
        "value": {"type": "number"},
        "mark": {"enum": list(MARKS)},
        "source": {"type": "string", "minLength": 3},
    },
}
_TABLE = {
    "type": "object",
    "required": ["caption", "labels", "values", "units", "rows"],
    "additionalProperties": False,
    "properties": {
        "caption": {"type": "string"},
        "labels": {"type": "array", "items": {"type": "string"}},
        "values": {"type": "array", "items": {"type": "string"}},
        "units": {"type": "object", "additionalProperties": {"type": "string"}},
        "source": {"type": "string"},
        "rows": {"type": "array", "items": {"type": "object"}},
        "notes": {"type": "array", "items": {"type": "string"}},
    },
}
_PAPER = {
    "type": "object",
    "required": ["key", "cite", "title", "authors", "venue", "url", "tables"],
    "additionalProperties": False,
    "properties": {
        **{name: {"type": "string"} for name in ("key", "cite", "title", "authors", "venue", "url", "code")},
        "tables": {"type": "object", "additionalProperties": _TABLE},
    },
}


def available() -> list[str]:
    """Keys of the papers that have a file here."""
    return list(_papers())


def load(key: str) -> dict[str, Any]:
    """The checked contents of one paper's file."""
    papers = _papers()
    if key not in papers:
        raise unknown("paper", key, papers)
    return papers[key]


def table(key: str, name: str) -> pd.DataFrame:
    """One table: label columns, value columns and for each value `NAME_mark` and `NAME_source`."""
    tables = load(key)["tables"]
    if name not in tables:
        raise unknown(f"table of {key}", name, tables)
    spec = tables[name]
    columns = [*spec["labels"], *(f"{v}{end}" for v in spec["values"] for end in ("", "_mark", "_source"))]
    rows = []
    for row in spec["rows"]:
        flat = {label: row[label] for label in spec["labels"]}
        for value in spec["values"]:
            cell = row[value]
            flat[value] = cell["value"]
            flat[f"{value}_mark"] = cell["mark"]
            flat[f"{value}_source"] = cell.get("source", spec.get("source", ""))
        rows.append(flat)
    return pd.DataFrame(rows, columns=columns)


def show(value: float, mark: str, unit: str = "") -> str:
    """A figure with its mark in words, e.g. "67.36 % reported (unverified)"."""
    if mark not in MARKS:
        raise unknown("evidence mark", mark, MARKS)
    space = "" if unit in ("", "×") else " "
    return f"{value:g}{space}{unit}{MARKS[mark]}"


def markdown(key: str, name: str) -> str:
    """One table as markdown: every unverified figure says so, and the notes follow."""
    spec = load(key)["tables"].get(name)
    frame = table(key, name)
    shown = pd.DataFrame({label: frame[label] for label in spec["labels"]})
    for value in spec["values"]:
        unit = spec["units"].get(value, "")
        pairs = zip(frame[value], frame[f"{value}_mark"], strict=True)
        shown[value.replace("_", " ")] = [show(v, m, unit) for v, m in pairs]
    lines = [f"*{spec['caption']}*", "", *_pipes(shown), ""] if len(shown) else [f"*{spec['caption']}*", ""]
    return "\n".join(lines + [f"- {note.strip()}" for note in spec.get("notes", [])])


def _pipes(frame: pd.DataFrame) -> list[str]:
    head = [str(column) for column in frame.columns]
    rows = [[str(cell) for cell in row] for row in frame.itertuples(index=False)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


@cache
def _papers() -> dict[str, dict[str, Any]]:
    papers = {}
    for file in sorted(files(__package__).iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yml"):
            paper = yaml.safe_load(file.read_text(encoding="utf-8"))
            _check(file.name, paper)
            papers[paper["key"]] = paper
    return papers


def _check(name: str, paper: Any) -> None:
    """Raises DataError naming the file and the place."""
    try:
        jsonschema.validate(paper, _PAPER)
        for key, spec in paper["tables"].items():
            row_schema = {
                "required": [*spec["labels"], *spec["values"]],
                "additionalProperties": False,
                "properties": {
                    **{label: {"type": "string"} for label in spec["labels"]},
                    **{value: _CELL for value in spec["values"]},
                },
            }
            for number, row in enumerate(spec["rows"]):
                jsonschema.validate(row, row_schema)
                for value in spec["values"]:
                    cell = row[value]
                    if cell["mark"] != "M" and not cell.get("source", spec.get("source")):
                        mark = f"{value} is marked {cell['mark']} without a source"
                        raise DataError(f"{name}: tables.{key} row {number}: {mark}")
    except jsonschema.ValidationError as problem:
        place = "/".join(str(part) for part in problem.absolute_path) or "(top)"
        raise DataError(f"{name}: {place}: {problem.message}") from problem
