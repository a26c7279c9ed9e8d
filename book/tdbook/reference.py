"""The API reference: a page per module, which Sphinx's autodoc fills from docstrings, and an overview.

This module is a Sphinx extension as well (see `_config.yml`): docstrings here are plain text with code in
backticks, so that a star in one cannot break the book, and are turned to reStructuredText on the way.
"""

from __future__ import annotations

import pkgutil
import re
from typing import Any

import tdbook
import tdlib

#: The command lines are described by their own help.
HIDDEN = ("tdlib.cli", "tdbook.__main__")

INTRODUCTION = """Made from the docstrings. These names can be taken from `tdlib` itself and are the stable
ones; the pages below describe the modules that hold them, and what they are made of."""


def modules() -> list[str]:
    """Modules of both packages that the reference describes, sorted."""
    walks = [pkgutil.walk_packages(package.__path__, f"{package.__name__}.") for package in (tdlib, tdbook)]
    names = sorted(info.name for walk in walks for info in walk)
    return [name for name in names if not any(f"{name}.".startswith(f"{hidden}.") for hidden in HIDDEN)]


def page(module: str) -> str:
    """The page of one module."""
    return f"# `{module}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```\n"


def overview() -> str:
    """The public names with their first lines, each with a link to where it is described."""
    things = [getattr(tdlib, name) for name in dir(tdlib)]
    things = [thing for thing in things if hasattr(thing, "__qualname__")]  # functions and classes
    names = [f"   ~{thing.__module__}.{thing.__qualname__}" for thing in things]
    return "\n".join(["# API reference", "", INTRODUCTION, "", "```{eval-rst}", ".. autosummary::",
                      "   :nosignatures:", "", *sorted(names), "```"])  # fmt: skip


def to_rst(lines: list[str]) -> list[str]:
    """A docstring's lines as reStructuredText: paragraphs, code where all is indented, lists line by line."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    return [line for block in blocks for line in [*_block(block.split("\n")), ""]]


def _block(lines: list[str]) -> list[str]:
    if lines[0].startswith(">>> "):
        return lines
    indented = [line.startswith(" ") for line in lines]
    if all(indented):
        return ["::", "", *("   " + line for line in lines)]
    if any(indented) or any(re.match(r"[-*] |[\w., `*]+: ", line) for line in lines):
        return [f"| {' ' * (len(line) - len(line.lstrip()))}{_escape(line.strip())}" for line in lines]
    return [_escape(line) for line in lines]


def _escape(line: str) -> str:
    """Markup escaped but for code in backticks, which gets two of them."""
    parts = re.split(r"(``[^`]+``|`[^`]+`)", line)
    return "".join(f"``{part.strip('`')}``" if part.startswith("`") else re.sub(r"([\\*_|`])", r"\\\1", part)
                   for part in parts)  # fmt: skip


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""

    def process(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
        lines[:] = to_rst(lines)

    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
