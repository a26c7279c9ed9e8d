"""What functions take by name, and whether arguments are of the kind that annotations say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any

from tdlib.errors import TdlibError

KINDS: dict[str, tuple[type, str]] = {
    "bool": (bool, "True or False"), "int": (Integral, "a whole number"), "float": (Real, "a number"),
    "str": (str, "text"), "None": (type(None), "None"), "Path": (PathLike, "a path"),
    "Mapping[str, Any]": (Mapping, "a table (dict)"), "Sequence[str]": (Sequence, "a list of names"),
    "Mapping[str, Sequence[int]]": (Mapping, "a table (dict)"),
}  # fmt: skip


def accepted(
    function: Callable[..., Any], given: Mapping[str, Any], rest: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Those of the given arguments that the function takes by name, or passes on to `rest`."""
    valid = keywords(function) + (keywords(rest) if rest is not None and passes_on(function) else [])
    return {name: value for name, value in given.items() if name in valid}


def passes_on(function: Callable[..., Any]) -> bool:
    """Whether it takes any keyword, which it hands to `train.fit`."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def keywords(function: Callable[..., Any]) -> list[str]:
    """Keyword arguments of a function."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def check_kinds(functions: Iterable[Callable[..., Any]], given: Mapping[str, Any]) -> None:
    """Raises TdlibError for a value that is not of the kind that the functions' annotations say."""
    for function in functions:
        for parameter in inspect.signature(function).parameters.values():
            names = [part.strip() for part in str(parameter.annotation).split("|")]
            if parameter.name in given and all(name in KINDS for name in names):
                value = given[parameter.name]
                if not any(_is(value, name) for name in names):
                    wanted = " or ".join(KINDS[name][1] for name in names)
                    raise TdlibError(f"{parameter.name} must be {wanted}, got {value!r}")


def _is(value: Any, name: str) -> bool:
    kind = KINDS[name][0]
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
