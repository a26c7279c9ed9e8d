"""Numbers inside the library that decide a result though no run sets them: sweeps, tolerances, ridges, ..."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from inspect import signature
from types import FunctionType, ModuleType
from typing import Any

import tdlib.decompositions

_FURTHER = ("tdlib.calibration.sensitivity", "tdlib.train.stages")


def numerics() -> dict[str, dict[str, float]]:
    """Module -> its constants that are numbers and, as "function.argument", the numbers that its functions
    take by default: of all decompositions, of the Fisher information and of re-estimating BatchNorm."""
    solvers = pkgutil.walk_packages(tdlib.decompositions.__path__, "tdlib.decompositions.")
    names = [*(module.name for module in solvers), *_FURTHER]
    found = {name: _of(import_module(name)) for name in names}
    return {name: numbers for name, numbers in found.items() if numbers}


def _of(module: ModuleType) -> dict[str, float]:
    constants = {name: value for name, value in vars(module).items() if name.isupper()}
    functions = [f for f in vars(module).values() if isinstance(f, FunctionType)]
    defaults = {
        f"{function.__name__}.{p.name}": p.default
        for function in functions
        if function.__module__ == module.__name__
        for p in signature(function).parameters.values()
        if p.name != "seed"
    }
    return {name: value for name, value in {**constants, **defaults}.items() if _number(value)}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
