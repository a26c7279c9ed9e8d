"""tdlib: compress neural networks by tensor decompositions.

    cost = tdlib.count(model, (3, 32, 32))
    plan = tdlib.plan(model, (3, 32, 32), format="tucker2", ratio=2.4)
    small = tdlib.decompose(model, plan)
    print(tdlib.compare(model, small, (3, 32, 32)))
    tdlib.save(small, "small.safetensors")

Names are imported on first use, so that the command line's help does not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdlib.calibration import (
        Statistics,
        correct_bias,
        load_statistics,
        recalibrate_batchnorm,
        statistics,
    )
    from tdlib.layers import decompose, project, to_dense
    from tdlib.methods import compress
    from tdlib.planning.compare import Comparison, compare
    from tdlib.planning.cost import Cost, count
    from tdlib.planning.plan import Plan, plan
    from tdlib.records import record, records
    from tdlib.serialise import load, save

__version__ = "0.1.0"

#: Public name -> the module that defines it.
_HOME = {
    **dict.fromkeys(("Cost", "Plan", "count", "plan", "Comparison", "compare"), "planning"),
    **dict.fromkeys(("decompose", "project", "to_dense"), "layers"),
    **dict.fromkeys(("Statistics", "load_statistics", "statistics"), "calibration"),
    **dict.fromkeys(("correct_bias", "recalibrate_batchnorm"), "calibration"),
    **dict.fromkeys(("load", "save"), "serialise"),
    "compress": "methods",
    **dict.fromkeys(("record", "records"), "records"),
}
_MODULES = ("data", "errors", "layers", "methods", "models", "papers", "planning", "plots", "tensor", "train")

__all__ = [
    "Comparison",
    "Cost",
    "Plan",
    "Statistics",
    "compare",
    "compress",
    "correct_bias",
    "count",
    "decompose",
    "load",
    "load_statistics",
    "plan",
    "project",
    "recalibrate_batchnorm",
    "record",
    "records",
    "save",
    "statistics",
    "to_dense",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"tdlib.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"tdlib.{name}")
    raise AttributeError(f"module 'tdlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])


class _Public(ModuleType):
    """The package: a public function keeps its name although a submodule is called the same (`records`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Public
