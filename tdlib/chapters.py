"""Run the book's notebooks: list, execute by papermill, strip, collect sweeps.

The Snakefile calls this module as ``python -m tdlib.chapters COMMAND``; nothing here knows a chapter
by name. An executed notebook is cleaned of everything that differs between two equal runs (timings,
random cell ids, split output streams), so that an unchanged chapter gives an identical file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tdlib.errors import TdlibError, unknown

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "book" / "_build"
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
    for key in [k for k in nb.metadata if k not in ("kernelspec", "language_info")]:
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
            raise TdlibError(f"sweep cell {cell} wrote no record: its chapter must call tdlib.record")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: ``list``, ``run``, ``strip``, ``failures``, ``collect``, ``stage``, ``readme``."""
    parser = argparse.ArgumentParser(prog="python -m tdlib.chapters", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of the chapters")
    run = commands.add_parser("run", help="execute one chapter")
    run.add_argument("notebook", help="a chapter's name or a notebook's path")
    run.add_argument("--output", required=True, type=Path)
    run.add_argument("--failed", default=FAILED, type=Path, help="folder for partial notebooks")
    run.add_argument("--records", type=Path, help="folder for the records that the chapter writes")
    run.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE")
    stripping = commands.add_parser("strip", help="remove outputs from the committed notebooks")
    stripping.add_argument("paths", nargs="*", type=Path)
    commands.add_parser("failures", help="name the chapters whose last run failed")
    joining = commands.add_parser("collect", help="join a sweep's records into one table")
    joining.add_argument("cells", nargs="+", type=Path)
    joining.add_argument("--table", required=True, type=Path)
    commands.add_parser("stage", help="copy pages and generated tables to where the book is built")
    readme = commands.add_parser("readme", help="rewrite the README's generated table")
    readme.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args(arguments)

    if options.command == "list":
        print("\n".join(names()))
    elif options.command == "run":
        source = Path(options.notebook)
        source = source if source.suffix == ".ipynb" else notebook(options.notebook)
        given = dict(pair.split("=", 1) for pair in options.parameters)
        if options.records is not None:
            shutil.rmtree(options.records, ignore_errors=True)
            os.environ["TDLIB_RECORDS"] = str(options.records.resolve())
        start = time.perf_counter()
        try:
            execute(source, options.output, {k: value(v) for k, v in given.items()}, failed=options.failed)
        except TdlibError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"chapter {source.stem}: {time.perf_counter() - start:.0f} s", flush=True)
    elif options.command == "strip":
        for path in strip(options.paths or sorted(NOTEBOOKS.glob("*.ipynb"))):
            print(path)
    elif options.command == "failures":
        for path in failures():
            print(f"chapter {path.stem} failed; partial notebook: {path}", file=sys.stderr)
    elif options.command == "collect":
        print(collect(options.cells, options.table))
    else:
        from tdlib import pages

        if options.command == "stage":
            pages.stage()
        elif not pages.update_readme(check=options.check):
            print("README.md is out of date: run python -m tdlib.chapters readme", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
