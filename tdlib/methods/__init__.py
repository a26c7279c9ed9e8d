"""The compression methods of the book behind one function.

A method is a module here with `compress(model, data, *, ratio, by, seed, **hyper) -> nn.Module`; `METHODS`
has one row for each. To add a method, write the module and add a row.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
from torch import nn

from ..errors import unknown

__all__ = ["METHODS", "Method", "available", "compress", "hyperparameters"]

FACTORISED = "tt, tucker2, cp, cp4, svd, tr, tt-matrix"


@dataclass(frozen=True)
class Method:
    """One row of the table: where the method lives and what it asks of its user."""

    module: str
    paper: str
    data: str
    labels: bool
    training: str
    formats: str
    ratio: str


METHODS: dict[str, Method] = {
    "direct": Method(
        "tdlib.methods.direct", "baseline: decompose once", "for measuring and fine-tuning", False,
        "optional fine-tuning", FACTORISED, "within 2 % of the target"),
    "admm": Method(
        "tdlib.methods.admm", "Yin et al., CVPR 2021", "training set", True,
        "full training, then fine-tuning", FACTORISED, "within 2 % of the target"),
    "iterative": Method(
        "tdlib.methods.iterative", "Gusak et al., ICCVW 2019", "training set", True,
        "fine-tuning after every step", "tucker2, svd, cp", "reached step by step, stops at the target"),
    "rstd": Method(
        "tdlib.methods.rstd", "Li et al., ICASSP 2019", "training set", True,
        "training from scratch through the factors", "tt, tr, cp, tucker2", "close to the target"),
    "distribution-aware": Method(
        "tdlib.methods.distribution_aware", "Kalle et al., NeurIPS 2025", "unlabelled inputs", False,
        "none", "tucker2, cp, svd, tt", "within 2 % of the target"),
}  # fmt: skip


def available() -> pd.DataFrame:
    """Table of the methods: paper, needs (data, labels, training), formats, how it keeps the ratio."""
    rows = [{"name": name, **asdict(method)} for name, method in METHODS.items()]
    return pd.DataFrame(rows).drop(columns="module").set_index("name")


def hyperparameters(method: str) -> tuple[str, ...]:
    """Names that `compress(..., method, ...)` takes beside model, data, ratio, by and seed.

    A method that passes unnamed arguments on to `train.fit` takes the names of that function too.
    """
    function = _function(method)
    names = _keywords(function)
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        from tdlib.train import fit

        names += [name for name in _keywords(fit) if name not in {*names, "epochs", "lr", "hooks"}]
    return tuple(name for name in names if name not in ("ratio", "by", "seed"))


def compress(
    model: nn.Module,
    method: str,
    data: Any,
    *,
    ratio: float,
    by: str = "params",
    seed: int = 0,
    **hyper: Any,
) -> nn.Module:
    """Compress `model` by the named method to `ratio` = dense / compressed, in "params" or "macs".

    `model` is not changed. What was measured on the way is in `result._tdlib["report"]`.

    Raises: UnknownName for a method or a hyper-parameter that does not exist; both list the valid names.
    """
    function = _function(method)
    valid = hyperparameters(method)
    for name in hyper:
        if name not in valid:
            raise unknown(f"hyper-parameter of {method!r}", name, valid)
    if by not in ("params", "macs"):
        raise unknown("ratio kind", by, ("params", "macs"))
    return function(model, data, ratio=ratio, by=by, seed=seed, **hyper)


def _function(method: str) -> Callable[..., nn.Module]:
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    return importlib.import_module(METHODS[method].module).compress


def _keywords(function: Callable[..., Any]) -> list[str]:
    parameters = list(inspect.signature(function).parameters.values())[2:]
    return [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
