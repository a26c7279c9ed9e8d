"""The API page, made from signatures and docstrings.

Docstrings here are plain text with code in backticks, so they are turned to markdown and not parsed as
reStructuredText: a star in a docstring must not break the book. Signatures go through Sphinx's Python
domain, so every function has an anchor, an index entry and can be cross-referenced.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from typing import Any

#: Modules that are tools of the book or the command line rather than of its readers.
HIDDEN = ("tdlib.chapters", "tdlib.pages", "tdlib.reference", "tdlib.cli", "tdlib.commands", "tdlib.claims")

_ITEM = re.compile(r"^(`{0,2}[A-Za-z_*][\w.*]*`{0,2}(?:, `{0,2}[\w.*]+`{0,2})*): +")


def modules() -> list[str]:
    """The library's modules that the reference describes, parents first."""
    import tdlib

    found = sorted(info.name for info in pkgutil.walk_packages(tdlib.__path__, "tdlib.")
                   if not any(part.startswith("_") for part in info.name.split(".")))
    return [name for name in found if not any(name == n or name.startswith(n + ".") for n in HIDDEN)]


def members(module: Any) -> list[str]:
    """Public functions and classes written in a module, in the order of its source."""
    return [name for name, thing in vars(module).items() if not name.startswith("_")
            and (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__ == module.__name__]


def escape(line: str) -> str:
    """Markdown's special characters escaped outside code in backticks."""
    parts = re.split(r"(``[^`]+``|`[^`]+`)", line)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>$|#`~{}])", r"\\\1", part)
                   for part in parts)


def to_markdown(docstring: str | None) -> str:
    """A docstring as markdown: paragraphs, lists (``name: meaning``, hanging lines), code where indented."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(docstring or ""))
    return "\n\n".join(_block(block.splitlines()) for block in blocks if block.strip())


def _block(lines: list[str]) -> str:
    indented = [line.startswith(" ") for line in lines]
    if all(indented):
        width = min(len(line) - len(line.lstrip()) for line in lines)
        return "```text\n" + "\n".join(line[width:] for line in lines) + "\n```"
    if lines[0].startswith(">>> "):
        return "```python\n" + "\n".join(lines) + "\n```"
    bullets = any(line.startswith(("- ", "* ")) for line in lines)
    if not bullets and not any(indented) and not any(_ITEM.match(line) for line in lines):
        return "\n".join(escape(line) for line in lines)
    items: list[str] = []
    for line, inner in zip(lines, indented, strict=True):
        named = _ITEM.match(line)
        if line.startswith(("- ", "* ")):
            items.append("- " + escape(line[2:]))
        elif named:
            items.append(f"- **{escape(named[1])}**: {escape(line[named.end():])}")
        elif inner or (items and not any(indented)):
            items.append("  " + escape(line.strip()))
        elif bullets or any(_ITEM.match(other) for other in lines):
            items.append(escape(line) + ("\n" if not items else ""))
        else:  # hanging lines: what is indented belongs to the line above
            items.append("- " + escape(line))
    return "\n".join(items)


def _signature(thing: Any) -> str:
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return "()"
    kept = [p for name, p in signature.parameters.items() if name not in ("self", "cls")]
    shown = [p.replace(annotation=_Text.of(p.annotation, True), default=_Text.of(p.default)) for p in kept]
    result = signature.return_annotation
    result = inspect.Signature.empty if inspect.isclass(thing) else _Text.of(result, True)
    text = str(signature.replace(parameters=shown, return_annotation=result))
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", text)  # collections.abc.Sequence -> Sequence


class _Text:
    """A part of a signature as the page shows it: no quotes around annotations, dots for objects."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    @classmethod
    def of(cls, value: Any, annotation: bool = False) -> Any:
        if value is inspect.Parameter.empty or (annotation and not isinstance(value, str)):
            return value
        text = value if annotation else repr(value)
        return cls(text if annotation or (len(text) <= 40 and "<" not in text) else "...")


def _directive(kind: str, name: str, signature: str, body: str, fence: str) -> str:
    return f"{fence}{{py:{kind}}} {name}{signature}\n\n{body}\n{fence}"


def _entry(module: str, name: str, thing: Any) -> str:
    full = f"{module}.{name}"
    if not inspect.isclass(thing):
        return _directive("function", full, _signature(thing), to_markdown(thing.__doc__), "````")
    parts = [to_markdown(thing.__doc__)]
    for key, member in vars(thing).items():
        if key.startswith("_") or not inspect.getdoc(member):
            continue
        if isinstance(member, property):
            parts.append(_directive("attribute", f"{full}.{key}", "", to_markdown(member.__doc__), "````"))
        elif inspect.isfunction(member) or isinstance(member, classmethod | staticmethod):
            function = getattr(member, "__func__", member)
            text = to_markdown(function.__doc__)
            parts.append(_directive("method", f"{full}.{key}", _signature(function), text, "````"))
    signature = "" if issubclass(thing, Exception) else _signature(thing)
    return _directive("class", full, signature, "\n\n".join(parts), "`````")


def page() -> str:
    """The API page: the public names with their first lines, then every module."""
    import tdlib

    documented, lines = modules(), []
    for name in tdlib.__all__:
        thing = getattr(tdlib, name)
        first = re.split(r"(?<=[.:]) |\n\n", " ".join(inspect.cleandoc(thing.__doc__ or "").split("\n")))[0]
        link = f"`tdlib.{name}`"
        if getattr(thing, "__module__", None) in documented:
            link = f"{{py:obj}}`tdlib.{name} <{thing.__module__}.{thing.__qualname__}>`"
        lines.append(f"- {link}: {escape(first)}")
    parts = ["# API reference", "Made from the docstrings. The names under `tdlib` are the stable ones; the "
             "modules below hold them and what they are made of.", "## `tdlib`", "\n".join(lines)]
    for name in documented:
        module = importlib.import_module(name)
        found = members(module)
        if found:
            parts += [f"## `{name}`", to_markdown(module.__doc__)]
            parts += [_entry(name, member, getattr(module, member)) for member in found]
    return "\n\n".join(part for part in parts if part)
