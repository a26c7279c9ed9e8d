"""The book's workshop, called by the Snakefile and the Makefile: ``python -m tdbook COMMAND``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tdbook import chapters
from tdbook.paths import NOTEBOOKS
from tdlib.errors import TdlibError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; ``--help`` lists the commands."""
    parser = argparse.ArgumentParser(prog="python -m tdbook", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute one chapter")
    run.add_argument("notebook", help="a chapter's name or a notebook's path")
    run.add_argument("--output", required=True, type=Path)
    run.add_argument("--failed", default=chapters.FAILED, type=Path, help="folder for partial notebooks")
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

    if options.command == "run":
        return _run(options)
    if options.command == "strip":
        for path in chapters.strip(options.paths or sorted(NOTEBOOKS.glob("*.ipynb"))):
            print(path)
    elif options.command == "failures":
        for path in chapters.failures():
            print(f"chapter {path.stem} failed; partial notebook: {path}", file=sys.stderr)
    elif options.command == "collect":
        print(chapters.collect(options.cells, options.table))
    else:
        from tdbook import pages  # imports torch, which the other commands do without

        if options.command == "stage":
            pages.stage()
        elif not pages.update_readme(check=options.check):
            print("README.md is out of date: run python -m tdbook readme", file=sys.stderr)
            return 1
    return 0


def _run(options: argparse.Namespace) -> int:
    source = Path(options.notebook)
    source = source if source.suffix == ".ipynb" else chapters.notebook(options.notebook)
    given = dict(pair.split("=", 1) for pair in options.parameters)
    if options.records is not None:
        shutil.rmtree(options.records, ignore_errors=True)
        os.environ["TDLIB_RECORDS"] = str(options.records.resolve())
    start = time.perf_counter()
    parameters = {name: chapters.value(text) for name, text in given.items()}
    try:
        chapters.execute(source, options.output, parameters, failed=options.failed)
    except TdlibError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"chapter {source.stem}: {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
