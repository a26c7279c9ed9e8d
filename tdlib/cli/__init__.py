"""The command line `tdlib`: joins the commands of this folder and reports errors.

Exit codes: 0 done; 1 started and failed; 2 wrong command line (unknown name, missing or existing file);
130 or 143 ended by Ctrl-C or SIGTERM.
An error is one line on stderr; `--debug` shows the traceback instead. Nothing here imports torch before a
command runs, so that help stays fast.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from tdlib.cli import compress, network
from tdlib.cli.common import DebugOption, UsageError
from tdlib.errors import Interrupted, TdlibError, UnknownName

EXAMPLES = """Compress neural networks by tensor decompositions.

\b
Examples:
  tdlib methods
  tdlib count resnet20 --classes 10 --input-shape 3,32,32
  tdlib plan resnet20 --classes 10 --input-shape 3,32,32 --format tt --ratio 2.4
  tdlib compress --help
"""
CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]  # ClickException, wherever click is


class OneLineErrors(TyperGroup):
    """Runs a command; whatever it raises becomes one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings(), ended_by_sigterm():
                warnings.showwarning = one_line_warning
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            typer.echo(str(error) or "interrupted", err=True)
            sys.exit(128 + (error.signal if isinstance(error, Interrupted) else signal.SIGINT))
        except (CLICK_ERROR, typer.Exit, typer.Abort):
            raise  # typer reports these itself
        except Exception as error:
            if "debug" in ctx.meta:
                raise
            typer.echo(error_line(error), err=True)
            sys.exit(2 if isinstance(error, UsageError | UnknownName | FileNotFoundError) else 1)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the work as Ctrl-C does: nothing half-written stays."""

    def end(number: int, _: Any) -> None:
        raise Interrupted("terminated", number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line on stderr, without the place in the code."""
    typer.echo(f"warning: {message}", err=True)


def error_line(error: Exception) -> str:
    """One line that says what went wrong; foreign errors carry their type and the hint to --debug."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, TdlibError):
        return f"error: {text}"
    return f"error: {type(error).__name__}: {text} (--debug shows where)"


app = typer.Typer(
    name="tdlib",
    cls=OneLineErrors,
    help=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(help=EXAMPLES)
def main(debug: DebugOption = False) -> None:
    """Options before the command."""


app.command()(network.methods)
for command in (network.count, network.plan, network.compare, compress.compress):
    app.command(no_args_is_help=True)(command)
