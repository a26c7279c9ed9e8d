"""The book's pages: stage the sources for Sphinx, generate tables, refresh the README.

``stage`` copies pages, executed notebooks, configuration and static files to ``book/_build/src`` and writes
what ``GENERATED`` names. A file is written only when its text changes: Sphinx then
rebuilds only what changed. To add a generated piece, add a row to ``GENERATED`` and include
``_generated/NAME.md`` in a page.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import yaml

from tdbook import imagenet_cost, papers, reference, status, tables
from tdbook.claims import load_claims
from tdbook.figures import benchmarks as figure
from tdbook.paths import BOOK, BUILD, NOTEBOOKS, OLD_RESULTS, RESULTS, ROOT
from tdbook.records import read_record
from tdbook.sigma import SAMPLE
from tdbook.verdicts import Verdict, judge_all

SRC = BUILD / "src"
REPOSITORY = "https://github.com/tdlib/tdlib"
BEGIN, END = "<!-- results:begin (python -m tdbook readme) -->", "<!-- results:end -->"
OLDER = (
    "They lack the fingerprint of the starting weights, the settings of method and training, and the sizes "
    "of the splits; so they are kept apart and feed no verdict. Rules that were changed still read them."
)
SAMPLED = (
    "Of imagenet-sample *test %* and *dense %* are accuracies on training images that calibration does not "
    "see, and no run of it is one at full scale, also where an older record says so."
)


def saved_records(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(file, content) of every record in the folder, by file name, checked."""
    return [(path, read_record(path)) for path in sorted(folder.glob("*.json"))]


def verdicts() -> list[Verdict]:
    """The verdict on every claim of ``book/claims.yml``, computed from the committed records."""
    found, old = ([record for _, record in saved_records(folder)] for folder in (RESULTS, OLD_RESULTS))
    return judge_all(load_claims(), found, old)


def status_tables() -> str:
    """The tables "Reproduction status": all claims, after a line with the number of verdicts of each kind."""
    found = verdicts()
    return f"{status.counts(found)}\n\n{status.markdown(found)}"


def claims_of(paper: str) -> str:
    """The same of one paper, for its chapter, with the chapter's older records folded up below."""
    mine = [verdict for verdict in verdicts() if verdict.claim.paper == paper]
    chapters = {verdict.claim.records.chapter for verdict in mine}
    old = [pair for pair in saved_records(OLD_RESULTS) if pair[1]["chapter"] in chapters]
    head = "```{admonition} Older records\n:class: dropdown"
    folded = [f"{head}\n\n{OLDER}\n\n{_table(old)}\n```"] if old else []
    return "\n\n".join([status.markdown(mine), *folded])


def amendments() -> str:
    """Rules of the ledger that were changed."""
    return status.amendments(verdicts())


#: What a record's row shows: heading -> keys looked up in parameters, then metrics.
_SHOWN = {
    "data": ("dataset",),
    "network": ("model",),
    "method": ("method",),
    "format": ("format",),
    "ratio": ("ratio",),
    "of": ("by",),
    "seed": ("seed",),
    "epochs": ("epochs",),
    "test %": ("test_accuracy", "accuracy", "accuracy_finetuned", "accuracy_after"),
    "dense %": ("dense_test_accuracy", "dense_accuracy", "accuracy_dense"),
}


def _record_row(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    places = (record["parameters"], record["metrics"])
    link = f"{REPOSITORY}/blob/main/{path.relative_to(ROOT).as_posix()}"
    row: dict[str, Any] = {"record": f"[{path.stem.rpartition('-')[2]}]({link})"}
    for heading, keys in _SHOWN.items():
        values = (place.get(key) for key in keys for place in places)
        row[heading] = next((v for v in values if v is not None and not isinstance(v, dict | list)), None)
    row["scale"] = record["scale"].partition(":")[0]
    row["minutes"] = None if record["wall_seconds"] is None else round(record["wall_seconds"] / 60, 1)
    row["commit"] = f"`{record['git']['commit'][:7]}`" if record["git"] else None
    return row


def _without_empty(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    used = {key for row in rows for key, value in row.items() if value is not None}
    return [{key: value for key, value in row.items() if key in used} for row in rows]


def records() -> str:
    """Every committed record: a table per chapter, and what its scale and device mean; the old ones apart."""
    new = _chapters(saved_records(RESULTS)) or ["*No record that can feed a verdict yet.*"]
    old = _chapters(saved_records(OLD_RESULTS), level="###")
    return "\n\n".join([*new, *(["## Older records", OLDER, *old] if old else [])])


def _chapters(found: list[tuple[Path, dict[str, Any]]], level: str = "##") -> list[str]:
    parts: list[str] = []
    for chapter in dict.fromkeys(record["chapter"] for _, record in found):
        mine = [(path, record) for path, record in found if record["chapter"] == chapter]
        parts += [f"{level} {chapter}", _table(mine)]
        scales = dict.fromkeys(record["scale"] for _, record in mine if ":" in record["scale"])
        parts += ["\n".join(f"- *{scale}*" for scale in scales)] if scales else []
        parts.append(f"Run on: {', '.join(dict.fromkeys(record['device']['name'] for _, record in mine))}.")
    return parts


def _table(found: list[tuple[Path, dict[str, Any]]]) -> str:
    rows = [_record_row(path, record) for path, record in found]
    order = ("data", "network", "format", "of", "ratio", "method")
    rows.sort(key=lambda row: tuple(str(row[key]) for key in order))
    sampled = any(record["parameters"].get("dataset") == SAMPLE for _, record in found)
    return "\n\n".join([tables.markdown(_without_empty(rows)), *([SAMPLED] if sampled else [])])


def queue() -> str:
    """The queue of full runs, as a section, where there is one."""
    path = RESULTS / "QUEUE.md"
    if not path.is_file():
        return ""
    texts = path.read_text(encoding="utf-8").split("```")
    # Outside of code, headings go a level down.
    texts[::2] = [re.sub("^#", "##", text, flags=re.MULTILINE) for text in texts[::2]]
    return "```".join(texts)


def chapter_map() -> str:
    """Question and paper, from the notebooks' metadata, of staged chapters in the order of the contents."""
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    files = [ROOT / f"{row['file']}.ipynb" for part in toc["parts"] for row in part["chapters"]]
    rows = []
    for path in files:
        if (SRC / "notebooks" / path.name).is_file() and path.is_file():
            about = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("chapter", {})
            paper = f"{{cite:t}}`{about['paper']}`" if "paper" in about else None
            link = f"[](../notebooks/{path.name})"
            rows.append({"Chapter": link, "Question": about.get("question"), "Paper": paper})
    return tables.markdown(rows)


def benchmarks() -> str:
    """The measurements of ``benchmarks/results.json``: a table per topic, and where they were taken."""
    path = ROOT / "benchmarks" / "results.json"
    if not path.is_file():
        return "*No measurements are committed yet: run `make bench`.*"
    found, parts = json.loads(path.read_text(encoding="utf-8")), []
    for topic, machine in found["machines"].items():
        rows = [_benchmark_row(row) for row in found["rows"] if row["topic"] == topic]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        where = f"{machine['cpu']}, {machine['threads']} thread(s), timed by {machine['clock']}, "
        where += f"load average {machine['load_1min']}; Python {machine['python']}, {versions}"
        parts.append(f"## {topic.capitalize()}\n\n{tables.markdown(_without_empty(rows))}\n\n*{where}.*")
    judged = [row for row in found["rows"] if row["met"] is not None]
    met = sum(row["met"] for row in judged)
    return "\n\n".join([f"**{met} of {len(judged)} targets are met.**", *parts])


def benchmark_picture() -> str:
    """The same rows as an SVG."""
    path = ROOT / "benchmarks" / "results.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return figure.svg(rows)


def _benchmark_row(row: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {"what": row["name"], "against": row["b"]}
    if row["ratio"] is None:
        return shown | {"note": row["note"]}
    low, high = row["quartiles"]
    target = None if row["target"] is None else f"{'≤' if row['at_most'] else '≥'} {row['target']:.3g}"
    verdict = {None: None, True: "met", False: "missed"}[row["met"]]
    errors = None if row["error_a"] is None else f"{row['error_a']:.4f} / {row['error_b']:.4f}"
    return shown | {
        "ratio": f"{row['ratio']:.3g}",
        "quartiles": f"{low:.3g} to {high:.3g}",
        "target": target,
        "": verdict,
        "ms, tdlib / other": f"{row['a_ms']:.3g} / {row['b_ms']:.3g}",
        "error, tdlib / other": errors,
        "note": row["note"],
    }


#: Generated pieces: path in the staged ``book`` folder -> function that gives its markdown.
GENERATED: dict[str, Callable[[], str]] = {
    "_generated/status.md": status_tables,
    **{f"_generated/claims-{key}.md": partial(claims_of, key) for key in papers.available()},
    "_generated/amendments.md": amendments,
    "_generated/map.md": chapter_map,
    "_generated/records.md": records,
    "_generated/queue.md": queue,
    "_generated/benchmarks.md": benchmarks,
    "_generated/benchmarks.svg": benchmark_picture,
    "_generated/imagenet.md": imagenet_cost.generated,
    "api.md": reference.overview,
}


def _put(path: Path, content: bytes) -> None:
    """Write a file only when its content changes, so that its time stamp stays where nothing changed."""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _toc() -> str:
    """The table of contents without pages that are not staged, and with the reference's pages."""
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    for part in toc["parts"]:
        part["chapters"] = [
            row
            for row in part["chapters"]
            if any((SRC / f"{row['file']}{suffix}").is_file() for suffix in (".md", ".ipynb"))
        ]
        for row in part["chapters"]:
            if row["file"] == "book/api":
                row["sections"] = [{"file": f"book/api/{name}"} for name in reference.modules()]
    toc["parts"] = [part for part in toc["parts"] if part["chapters"]]
    return yaml.safe_dump(toc, sort_keys=False)


def _mathjax(target: Path) -> None:
    """Copy MathJax and its fonts from the package that carries it: the book asks nothing of the network."""
    package = importlib.import_module("sphinx-mathjax-offline")
    source = Path(str(package.__file__)).parent / "static" / "mathjax"
    for path in [source / "tex-chtml-full.js", *sorted((source / "output/chtml/fonts").rglob("*.woff"))]:
        _put(target / path.relative_to(source), path.read_bytes())


def _notebooks() -> None:
    """Stage every chapter: executed where a build has run it, else without outputs and saying so."""
    for path in NOTEBOOKS.glob("*.ipynb"):
        executed = BUILD / "executed" / path.name
        nb = nbformat.read(str(executed if executed.is_file() else path), as_version=4)
        if not executed.is_file():
            text = "```{note}\nThis chapter was not run in this build.\n```"
            nb.cells.insert(1, nbformat.v4.new_markdown_cell(text, id="note"))
        _put(SRC / "notebooks" / path.name, nbformat.writes(nb).encode())
    for path in (SRC / "notebooks").glob("*.ipynb"):  # chapters that were removed or renamed
        if not (NOTEBOOKS / path.name).is_file():
            path.unlink()


def stage() -> Path:
    """Bring everything that Sphinx reads to ``book/_build/src``; returns that folder."""
    _notebooks()
    _put(SRC / "_config.yml", (ROOT / "_config.yml").read_bytes())
    wanted = [
        path
        for folder in ("images", "static")
        for path in (BOOK / folder).rglob("*")
        if path.is_file() and path.suffix != ".py"
    ]
    for path in [*BOOK.glob("*.md"), *BOOK.glob("*.bib"), *wanted]:
        _put(SRC / "book" / path.relative_to(BOOK), path.read_bytes())
    for name, make in GENERATED.items():
        _put(SRC / "book" / name, (make() + "\n").encode())
    for name in reference.modules():
        _put(SRC / "book" / "api" / f"{name}.md", reference.page(name).encode())
    _put(SRC / "_toc.yml", _toc().encode())
    _mathjax(SRC / "static" / "mathjax")  # not _static: Jupyter Book loads every script there on every page
    return SRC


def update_readme(*, check: bool = False) -> bool:
    """Put the generated table between the README's markers; with ``check`` only say if it is up to date."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    fresh = f"{before}{BEGIN}\n\n{status_tables()}\n\n{END}{after}"
    if fresh == text or check:
        return fresh == text
    path.write_text(fresh, encoding="utf-8")
    return True
