"""The command line ``tdlib``: joins the commands of ``tdlib/commands`` and reports errors.

Exit codes: 0 done; 1 started and failed; 2 wrong command line (unknown name, missing or existing file).
An error is one line on stderr; ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from tdlib.commands import compress, network
from tdlib.commands.common import DebugOption, debugging, error_line, exit_code, reset

EXAMPLES = """Compress neural networks by tensor decompositions.

\b
Examples:
  tdlib methods
  tdlib count resnet20 --classes 10 --input-shape 3,32,32
  tdlib plan resnet20 --classes 10 --input-shape 3,32,32 --format tt --ratio 2.4
  tdlib compress --help
"""


def one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line on stderr, without the place in the code."""
    typer.echo(f"warning: {message}", err=True)


class OneLineErrors(TyperGroup):
    """Runs a command; whatever it raises becomes one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = one_line_warning
                return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            sys.exit(130)
        except Exception as error:
            code = exit_code(error)
            if code is None or debugging():
                raise
            typer.echo(error_line(error), err=True)
            sys.exit(code)
        finally:
            reset()


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


NEED_ARGUMENTS = (compress.compress, network.count, network.plan, network.compare)

for command in (network.methods, *NEED_ARGUMENTS):
    app.command(no_args_is_help=command in NEED_ARGUMENTS)(command)


if __name__ == "__main__":
    app()
