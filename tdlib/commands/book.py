"""The book's side: ``tdlib methods``, ``tdlib chapters``, ``tdlib run``, ``tdlib records``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .common import DebugOption, ForceOption, JsonOption, UsageError, check_output, parse_value, table


class PairCommand(TyperCommand):
    """A command that takes ``-p key value`` (as papermill does) as well as ``-p key=value``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, join_pairs(args))


def join_pairs(arguments: list[str]) -> list[str]:
    """``["-p", "seed", "1"]`` -> ``["-p", "seed=1"]``."""
    rest, joined = list(arguments), []
    while rest:
        joined.append(rest.pop(0))
        if joined[-1] in ("-p", "--parameter") and len(rest) > 1 and "=" not in rest[0]:
            joined.append(f"{rest.pop(0)}={rest.pop(0)}")
    return joined


def methods(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """The compression methods: paper, what each needs, formats.

    \b
    Examples:
      tdlib methods
    """
    from tdlib.methods import available

    frame = available()
    if as_json:
        typer.echo(frame.to_json(orient="index"))
        return
    for name, row in frame.iterrows():
        typer.echo(f"{name}")
        for column, value in row.items():
            typer.echo(f"  {column:<9} {'yes' if value is True else 'no' if value is False else value}")


def chapters(debug: DebugOption = False) -> None:
    """The book's chapters and the parameters that each takes.

    \b
    Examples:
      tdlib chapters
    """
    from tdlib import chapters as book

    names = book.names()
    if not names:
        raise UsageError(NO_CHECKOUT)
    for name in names:
        parameters = ", ".join(f"{key}={value}" for key, value in book.defaults(book.notebook(name)).items())
        typer.echo(f"{name}\n  {parameters}")


def run(
    chapter: Annotated[str, typer.Argument(help="A name from `tdlib chapters`.")],
    parameter: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", metavar="KEY VALUE", help="May be repeated.")
    ] = None,
    profile: Annotated[str, typer.Option(help="quick or full.")] = "quick",
    out: Annotated[
        Path | None, typer.Option(help="Executed notebook; default CHAPTER.executed.ipynb.")
    ] = None,
    records_dir: Annotated[
        Path | None, typer.Option("--records", help="Folder for the records it writes.")
    ] = None,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Execute a chapter's notebook with your parameters.

    \b
    Examples:
      tdlib run primer -p seed 1 --out primer.ipynb
      tdlib run primer -p dataset imagefolder:photos -p model cnn --profile quick --force
    """
    from tdlib import chapters as book

    if not book.names():
        raise UsageError(NO_CHECKOUT)
    if profile not in ("quick", "full"):
        raise UsageError(f"--profile {profile!r}: quick or full")
    source = book.notebook(chapter)
    target = out or Path(f"{chapter}.executed.ipynb")
    check_output(target, force)
    given = {"profile": profile}
    for pair in parameter or ():
        key, sign, value = pair.partition("=")
        if not sign:
            raise UsageError(f"-p {pair}: write -p key value")
        given[key] = absolute(parse_value(value))
    if records_dir is not None:
        os.environ["TDLIB_RECORDS"] = str(records_dir.resolve())
    typer.echo(f"running {chapter}: {', '.join(f'{k}={v}' for k, v in given.items())}", err=True)
    path = book.execute(source, target.resolve(), given, failed=target.resolve().parent / "failed")
    typer.echo(f"written: {path}", err=True)


def absolute(value: Any) -> Any:
    """``imagefolder:photos`` and ``npz:file`` made absolute: a chapter runs in the repository's root."""
    if isinstance(value, str):
        kind, sign, path = value.partition(":")
        if sign and kind in ("imagefolder", "npz"):
            return f"{kind}:{Path(path).expanduser().resolve()}"
    return value


def records(
    folder: Annotated[Path | None, typer.Option(help="Folder of records; default: the repository's.")] = None,
    chapter: Annotated[str | None, typer.Option(help="Only this chapter's.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The recorded runs, newest last.

    \b
    Examples:
      tdlib records
      tdlib records --chapter admm_tt --json
    """
    from tdlib import chapters as book
    from tdlib.records import records as load

    kept = book.ROOT / "book" / "results"
    if folder is None and not kept.is_dir():
        typer.echo("no records")
        return
    frame = load(folder or kept, chapter)
    if as_json:
        typer.echo(frame.to_json(orient="records"))
        return
    if not len(frame):
        typer.echo("no records")
        return
    wanted = [
        "chapter",
        "dataset",
        "model",
        "method",
        "format",
        "ratio",
        "by",
        "seed",
        "test_accuracy",
        "scale",
    ]
    columns = [name for name in wanted if name in frame.columns]
    rows = [[_short(value) for value in row] for row in frame[columns].itertuples(index=False)]
    typer.echo(table(columns, rows))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:g}"
    return "" if value is None else str(value)[:40]


NO_CHECKOUT = "the chapters are notebooks of the repository: clone it and run `pip install -e '.[book]'`"
