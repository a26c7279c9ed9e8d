"""`python -m tdlib.cli`: the command line without its script."""

from tdlib.cli import app

app()
