"""What the papers report, as data: every figure with a mark that says how far it can be trusted.

One YAML file per paper lies in `book/papers`. A figure's mark is
  V       read directly in the named source,
  V-calc  computed from figures read in the named source,
  M       recalled, not checked against the paper; shown as "reported (unverified)" and never used in a test.
Pages and notebooks quote papers through `table` and `markdown` only, so no figure is typed twice.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

import pandas as pd
import yaml
from pydantic import Field, StringConstraints, model_validator

from tdbook import tables
from tdbook.paths import PAPERS
from tdbook.schema import Strict, Text, validate
from tdlib.errors import TdlibError, unknown

Mark = Literal["V", "V-calc", "M"]
MARKS = {"V": "", "V-calc": " (calculated)", "M": " reported (unverified)"}


class Cell(Strict):
    """One figure."""

    value: float
    mark: Mark
    source: Annotated[str, StringConstraints(min_length=3)] | None = None


class Table(Strict):
    """A table of a paper: in every row a text for each of `labels` and a figure for each of `values`."""

    caption: str
    labels: list[str]
    values: list[str]
    units: dict[str, str]
    source: str | None = None
    rows: list[dict[str, str | Cell]]
    notes: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _complete(self) -> Table:
        kinds = dict.fromkeys(self.labels, str) | dict.fromkeys(self.values, Cell)
        for number, row in enumerate(self.rows):
            if {name: type(cell) for name, cell in row.items()} != kinds:
                raise ValueError(f"row {number} needs the texts {self.labels}, the figures {self.values}")
            for name in self.values:
                cell = row[name]
                if isinstance(cell, Cell) and cell.mark != "M" and not (cell.source or self.source):
                    raise ValueError(f"row {number}: {name} is marked {cell.mark} without a source")
        return self


class Difference(Strict):
    """One point in which a chapter differs from its paper, or where the paper leaves it open.

    authors: what they did, known as `mark` says; here: what the chapter does, and why; effect: what that may
    change.
    """

    point: Text
    authors: Text
    mark: Mark
    here: Text
    why: Text
    effect: Text


class LayerRanks(Strict):
    """The ranks of one layer, and the modes of its channels where the format factorises them."""

    ranks: list[int]
    out_modes: list[int] | None = None
    in_modes: list[int] | None = None


class RankTable(Strict):
    """Ranks that the authors published for a network: layer (or glob, the first that matches counts) ->
    `LayerRanks`. ratios: dense / compressed of the whole network and of the layers in the table, every layer
    counted at its ranks, also where that makes it larger."""

    network: Text
    format: Text
    source: Text
    ratios: dict[Literal["params", "macs", "layers_params", "layers_macs"], float]
    layers: dict[str, LayerRanks]


class Paper(Strict):
    """One paper's file; `cite` is its key in the bibliography."""

    key: str
    cite: str
    title: str
    authors: str
    venue: str
    url: str
    code: str | None = None
    tables: dict[str, Table]
    differences: list[Difference] = Field(default_factory=list)
    ranks: dict[str, RankTable] = Field(default_factory=dict)


def available() -> list[str]:
    """Keys of the papers that have a file."""
    return list(_papers())


def load(key: str) -> Paper:
    """One paper. Raises UnknownName."""
    if key not in _papers():
        raise unknown("paper", key, _papers())
    return _papers()[key]


def table(key: str, name: str) -> pd.DataFrame:
    """One table: label columns, value columns and for each value `NAME_mark` and `NAME_source`."""
    spec = _table(key, name)
    columns = [*spec.labels, *(f"{v}{end}" for v in spec.values for end in ("", "_mark", "_source"))]
    rows = []
    for row in spec.rows:
        flat: dict[str, object] = {}
        for column, cell in row.items():
            if isinstance(cell, Cell):
                source = cell.source or spec.source or ""
                flat |= {column: cell.value, f"{column}_mark": cell.mark, f"{column}_source": source}
            else:
                flat[column] = cell
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
    spec, frame = _table(key, name), table(key, name)
    shown = frame[spec.labels].copy()
    for value in spec.values:
        pairs = zip(frame[value], frame[f"{value}_mark"], strict=True)
        head = value.replace("_", " ").replace("top1", "top-1")
        shown[head] = [show(v, m, spec.units.get(value, "")) for v, m in pairs]
    parts = [f"*{spec.caption}*", *([tables.markdown(shown)] if len(shown) else [])]
    return "\n\n".join([*parts, "\n".join(f"- {note.strip()}" for note in spec.notes)])


def differences(key: str) -> str:
    """What the chapter does otherwise than the paper, as a markdown table."""
    rows = [
        {
            "": one.point, "the authors": one.authors + MARKS[one.mark].replace(" reported", ""),
            "here": one.here, "why": one.why, "what it may change": one.effect,
        }
        for one in load(key).differences
    ]  # fmt: skip
    return tables.markdown(rows)


def ranks(key: str, name: str, model: str | None = None) -> dict[str, Any]:
    """A published table of ranks as arguments of `tdlib.compress`: format, ranks, options. model: that it is
    to be used with. Raises: UnknownName; TdlibError where it is another network's."""
    found = load(key).ranks
    if name not in found:
        raise unknown(f"rank table of {key}", name, found)
    if model not in (None, network := found[name].network):
        raise TdlibError(f"the rank table {name!r} is of {network}, got the model {model!r}: take {network}")
    layers = found[name].layers
    modes = {
        option: {layer: getattr(row, option) for layer, row in layers.items()}
        for option in ("out_modes", "in_modes")
    }
    return {
        "format": found[name].format,
        "ranks": {layer: row.ranks for layer, row in layers.items()},
        "options": {option: given for option, given in modes.items() if all(given.values())},
    }


def _table(key: str, name: str) -> Table:
    found = load(key).tables
    if name not in found:
        raise unknown(f"table of {key}", name, found)
    return found[name]


@cache
def _papers() -> dict[str, Paper]:
    papers = (
        validate(Paper, yaml.safe_load(file.read_text(encoding="utf-8")), file.name)
        for file in sorted(PAPERS.glob("*.yml"))
    )
    return {paper.key: paper for paper in papers}
