"""Run the book's notebooks: execute by papermill, strip, collect sweeps, say what a chapter is made of.

Nothing here knows a chapter by name. An executed notebook is cleaned of everything that differs between two
equal runs (timings, random cell ids, split output streams), so that an unchanged chapter gives an identical
file.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tdbook.paths import BUILD, NOTEBOOKS, ROOT
from tdlib.errors import TdlibError, unknown

FAILED = BUILD / "failed"

#: Metadata that papermill and editors write and that says nothing about the result.
_NOISE = ("papermill", "execution", "ExecuteTime", "collapsed", "scrolled")


class ChapterError(TdlibError):
    """A chapter's notebook failed; says which, in which cell, and where the partial notebook is kept."""


def names() -> list[str]:
    """Chapters, by the file names of their notebooks."""
    return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def notebook(chapter: str) -> Path:
    """Path of a chapter's notebook. Raises UnknownName listing the chapters."""
    if chapter not in names():
        raise unknown("chapter", chapter, names())
    return NOTEBOOKS / f"{chapter}.ipynb"


def defaults(path: str | Path) -> dict[str, Any]:
    """Parameters of a notebook and the default values written in its ``parameters`` cell."""
    import papermill

    found = papermill.inspect_notebook(str(path))
    return {name: row["default"] for name, row in found.items()}


def sources(path: str | Path, package: str | Path = ROOT / "book" / "tdbook") -> list[str]:
    """Files of the book's package that a notebook imports, directly or through one another, sorted.

    These alone decide, beside the notebook and the library, whether the chapter must run again.
    """
    package = Path(package)
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    waiting = _imports(re.sub(r"^(\s*)[%!].*", r"\1pass", "\n".join(code), flags=re.MULTILINE))
    found: set[Path] = set()
    while waiting:
        head, *rest = waiting.pop().split(".")
        place = package.joinpath(*rest)
        for file in (place / "__init__.py", place / "__init__.pyi", place.with_suffix(".py")):
            if head == package.name and file.is_file() and file not in found:
                found.add(file)
                waiting |= _imports(file.read_text(encoding="utf-8"))
    return sorted(map(str, found))


def _imports(code: str) -> set[str]:
    """Dotted names that the code imports, with their packages; only the package's own stub is relative."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = f"tdbook.{node.module}" if node.level else node.module
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.rsplit(".", cut)[0] for name in names for cut in range(name.count(".") + 1)}


def _one_stream(outputs: Iterable[Any]) -> list[Any]:
    """Join consecutive writes to one stream and keep what a terminal would show after carriage returns."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if output["output_type"] == "stream" and last is not None and last["output_type"] == "stream" \
                and last["name"] == output["name"]:
            last["text"] += output["text"]
        else:
            joined.append(output)
    for output in joined:
        if output["output_type"] == "stream":
            output["text"] = re.sub(r"[^\n]*\r(?!\n)", "", output["text"].replace("\r\n", "\n"))
    return joined


def clean(nb: Any, *, outputs: bool = True) -> Any:
    """Remove run-dependent metadata from a notebook in place; with ``outputs=False`` its outputs too."""
    for key in [k for k in nb.metadata if k not in ("kernelspec", "language_info", "chapter")]:
        del nb.metadata[key]
    nb.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.metadata["language_info"] = {"name": "python"}
    for cell in nb.cells:
        for key in _NOISE:
            cell.metadata.pop(key, None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell["id"] = "injected-parameters"
        if cell.cell_type != "code":
            continue
        if outputs:
            cell.outputs = _one_stream(cell.outputs)
        else:
            cell.outputs, cell.execution_count = [], None
    return nb


def _write(nb: Any, path: Path) -> None:
    """Write a notebook atomically."""
    import nbformat

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    nbformat.write(nb, str(partial))
    os.replace(partial, path)


def strip(paths: Iterable[str | Path]) -> list[Path]:
    """Bring notebooks to their committed form: no outputs, no counts, no noise. Returns those changed."""
    import nbformat

    changed = []
    for path in map(Path, paths):
        nb = clean(nbformat.read(str(path), as_version=4), outputs=False)
        nb.nbformat, nb.nbformat_minor = 4, 5
        if path.read_text(encoding="utf-8").rstrip("\n") != nbformat.writes(nb).rstrip("\n"):
            _write(nb, path)
            changed.append(path)
    return changed


def execute(source: str | Path, output: str | Path, parameters: Mapping[str, Any] | None = None, *,
            failed: str | Path = FAILED, timeout: int | None = None) -> Path:
    """Execute a notebook with ``parameters`` in the repository's root and write it, cleaned, to ``output``.

    Parameters that the notebook does not declare raise UnknownName before anything runs. If a cell
    fails, ``output`` is not written; the notebook up to the failure is kept as ``failed/NAME.ipynb``
    and ChapterError names the cell. ``timeout`` is in seconds per cell.
    """
    import nbformat
    import papermill
    from traitlets.config import Config

    source, output, failed = Path(source), Path(output), Path(failed)
    given = dict(parameters or {})
    declared = defaults(source)
    for name in given:
        if name not in declared:
            raise unknown(f"parameter of {source.name}", name, sorted(declared))
    kept = failed / source.name
    # tqdm asks for widgets, which a static page cannot show; the kernel inherits this setting.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    with tempfile.TemporaryDirectory(prefix="tdlib-") as folder:
        # Sockets in a folder of its own: ports could be taken by the kernel of another chapter.
        local = Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})
        partial = Path(folder) / source.name
        try:
            papermill.execute_notebook(str(source), str(partial), parameters=given, cwd=str(ROOT),
                                       kernel_name="python3", progress_bar=False, log_output=False,
                                       execution_timeout=timeout, iopub_timeout=60, config=local)
        except Exception as error:  # whatever broke, the reader gets the partial notebook and one sentence
            where = "before its first cell"
            if partial.exists():
                failed.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(partial, kept)
                where = f"partial notebook kept at {kept}"
            name, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
            cell = f" in cell [{error.exec_count}]" if hasattr(error, "exec_count") else ""
            raise ChapterError(f"chapter {source.stem} failed{cell}: {name}: {text} ({where})") from error
        if int(os.environ.get("RANK", "0")) == 0:  # under `accelerate launch` one process writes
            _write(clean(nbformat.read(str(partial), as_version=4)), output)
    kept.unlink(missing_ok=True)
    return output


def failures(folder: str | Path = FAILED) -> list[Path]:
    """Partial notebooks of chapters whose last run failed."""
    return sorted(Path(folder).glob("*.ipynb"))


def value(text: str) -> Any:
    """A command-line value: JSON where it parses (numbers, true, null, lists), else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def collect(cells: Sequence[str | Path], table: str | Path) -> Path:
    """Join the records that sweep cells wrote into one CSV: parameters, metrics, seed, run facts.

    ``cells`` are executed notebooks; each cell's records lie beside it in a folder of the same name
    (``cell.ipynb`` and ``cell/*.json``). A cell without a record raises TdlibError.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for cell in map(Path, cells):
        found = sorted(cell.with_suffix("").glob("*.json"))
        if not found:
            raise TdlibError(f"sweep cell {cell} wrote no record: its chapter must call tdbook.record")
        for path in found:
            record = json.loads(path.read_text(encoding="utf-8"))
            row = {"cell": cell.stem, "chapter": record.get("chapter"), "seed": record.get("seed")}
            row |= {k: v for k, v in record.get("parameters", {}).items() if not isinstance(v, dict | list)}
            row |= {k: v for k, v in record.get("metrics", {}).items() if isinstance(v, int | float | str)}
            rows.append(row)
    table = Path(table)
    table.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(table, index=False)
    return table
