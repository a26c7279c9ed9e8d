"""Factorised layers: the formats, the modules that compute them, and replacing a model's layers by them."""

from tdlib.layers.dense import to_dense
from tdlib.layers.formats import FORMATS, Format, Scheme, get_format, kind_of, project
from tdlib.layers.replace import decompose, reset_parameters, skeleton
from tdlib.layers.ring import RingConv2d, RingLinear
from tdlib.layers.ttmatrix import TTMatrixLinear

__all__ = [
    "FORMATS",
    "Format",
    "RingConv2d",
    "RingLinear",
    "Scheme",
    "TTMatrixLinear",
    "decompose",
    "get_format",
    "kind_of",
    "project",
    "reset_parameters",
    "skeleton",
    "to_dense",
]
