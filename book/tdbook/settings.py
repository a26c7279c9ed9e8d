"""What every chapter does with its parameters: a profile's recipe, with what is given in its place."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

import tdlib
from tdlib.data import Bundle
from tdlib.errors import TdlibError, unknown

#: The least that a setting can be; all are whole numbers.
_LEAST = dict.fromkeys(("seeds", "samples", "batch_size", "limit"), 1)
_LEAST |= dict.fromkeys(("epochs", "dense_epochs", "finetune_epochs"), 0)

#: Settings of length, data and rate: with one of them changed, a run is not its profile's.
SIZES = (
    "limit", "image_size", "samples", "batch_size", "epochs", "dense_epochs", "finetune_epochs",
    "trial_epochs", "warmup", "patience", "lr", "finetune_lr", "rates",
)  # fmt: skip


def recipe(profile: str, profiles: Mapping[str, Mapping[str, Any]], **given: Any) -> SimpleNamespace:
    """The profile's name and settings, those that are given (not None) in their place; read as attributes.

    `ratio` becomes `ratios`, a list of numbers, and `seeds` (how many) the list of seeds from `seed` on.
    `changed`: the SIZES that are not the profile's own.
    Raises: UnknownName for a profile; TdlibError for ratios and numbers of things that there cannot be.
    """
    if profile not in profiles:
        raise unknown("profile", profile, profiles)
    found = SimpleNamespace(profile=profile, **profiles[profile])
    vars(found).update({name: value for name, value in given.items() if value is not None})
    found.changed = [name for name in SIZES if getattr(found, name, None) != profiles[profile].get(name)]
    for name, least in _LEAST.items():
        value = getattr(found, name, None)
        if value is not None and not (isinstance(value, int) and value >= least):
            raise TdlibError(f"{name} must be a whole number of at least {least}, got {value!r}: give one")
    if getattr(found, "ratio", None) is not None:
        found.ratios = listed(found.ratio)
        if not min(found.ratios, default=0) > 1:
            raise TdlibError(
                f"ratio is dense / compressed and must be above 1, got {found.ratio!r}: give 2, or \"2, 4\""
            )
    first = getattr(found, "seed", 0)
    found.seeds = list(range(first, first + getattr(found, "seeds", 1)))
    return found


def identity(chosen: SimpleNamespace) -> dict[str, Any]:
    """The settings that make a run what it is, for `Recorder`: all but the ratios and seeds run over. A file
    of weights counts by its name and content, wherever it lies."""
    others = ("ratio", "ratios", "seed", "seeds", "changed")
    found = {name: value for name, value in vars(chosen).items() if name not in others}
    weights = Path(str(found.get("weights") or ""))
    if weights.is_file():
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
        found |= {"weights": weights.name, "weights_sha256": digest}
    return found


def overview(chosen: SimpleNamespace, heading: str) -> pd.DataFrame:
    """The recipe as a column of a table: all that is set, what lies in a table of its own by both names."""
    found: dict[str, Any] = {}
    for name, value in vars(chosen).items():
        inner = {f"{name}: {k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
        found |= {key: one for key, one in inner.items() if one not in (None, [])}
    return pd.Series(found).drop(["ratio", "seed"], errors="ignore").to_frame(heading)


def scaled(chosen: SimpleNamespace, what: str) -> str:
    """A record's `scale`: "quick", "full" of the full profile with its own sizes, else `what` was reduced."""
    if chosen.profile == "quick" or (chosen.profile == "full" and not chosen.changed):
        return str(chosen.profile)
    own = f"; the profile's own but for {', '.join(chosen.changed)}" if chosen.changed else ""
    return f"reduced: {what}{own}"


def folder(checkpoint_dir: str | None, *names: str) -> Path | None:
    """A folder of its own in `checkpoint_dir` for what the names say (a data set, a model); None without."""
    return None if checkpoint_dir is None else Path(checkpoint_dir) / file_name(*names)


def file_name(*names: str) -> str:
    """The names (imagefolder:PATH, timm:NAME, ...) as one that a file can have."""
    return re.sub("[:/]", "-", "-".join(names))


def listed(value: Any, kind: Callable[[Any], Any] = float) -> list[Any]:
    """A value, a list or text with commas ("2, 4, 8") as a list. Raises: TdlibError for what is none."""
    parts = value.split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    try:
        return [kind(part.strip() if isinstance(part, str) else part) for part in parts]
    except (TypeError, ValueError) as error:
        raise TdlibError(f"expected numbers with commas between, as \"2, 4, 8\", got {value!r}") from error


def named(kind: str, value: Any, valid: Iterable[str]) -> list[str]:
    """As `listed`, of names of this kind (one may have a comma itself). Raises: UnknownName."""
    known = list(valid)
    names = [value] if value in known else listed(value, str)
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)
    return names


def load(dataset: str, profile: str = "full", image_size: int | None = None, **source: Any) -> Bundle:
    """`tdlib.data.load`; the quick profile brings large images to a side of 32 unless told otherwise."""
    data = tdlib.data.load(dataset, image_size=image_size, **source)
    if profile == "quick" and image_size is None and data.input_shape[1] > 48:
        data = tdlib.data.load(dataset, image_size=32, **source)
    return data
