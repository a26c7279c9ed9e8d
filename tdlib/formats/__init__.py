"""Formats: how a layer is held in factors, and replacing a network's layers by them.

Every file of this folder that calls `register` adds its formats; nothing else has to know of it.
"""

from importlib import import_module
from pkgutil import iter_modules

from tdlib.formats.base import (
    FORMATS,
    KINDS,
    SPATIAL,
    Factors,
    Format,
    KernelFormat,
    LayerPlan,
    Ranks,
    Shape,
    get_format,
    kind_of,
    register,
)
from tdlib.formats.chains import to_dense
from tdlib.formats.replace import blank, decompose, install, project, skeleton

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "FORMATS",
    "KINDS",
    "SPATIAL",
    "Factors",
    "Format",
    "KernelFormat",
    "LayerPlan",
    "Ranks",
    "Shape",
    "blank",
    "decompose",
    "get_format",
    "install",
    "kind_of",
    "project",
    "register",
    "skeleton",
    "to_dense",
]
