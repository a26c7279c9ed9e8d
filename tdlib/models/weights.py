"""Weights from local files: safetensors, or a state_dict read with ``weights_only=True`` (no code is
unpickled).
"""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.errors import ClassCountError, DataError
from tdlib.files import fits, parse, read_tensors
from tdlib.network import INPUTS

PREFIXES = ("module.", "_orig_mod.", "model.")  # left by DataParallel, torch.compile and Lightning


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header metadata) of a weight file. Raises DataError."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"weight file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
                    raise DataError("its entries are compressed, which torch.save never does")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load names no closed list of what a broken file can raise
        raise DataError(
            f"{path} cannot be read as weights (safetensors or a plain state_dict): {error}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise DataError(f"{path} holds no state_dict (a mapping from parameter names to tensors)")
    return dict(found), {}


def saved_inputs(path: Path) -> dict[str, Any] | None:
    """What the weights in a file of `tdlib.save` were trained on; None for other files. Raises DataError."""
    header = read_state_dict(path)[1].get("tdlib") if path.suffix == ".safetensors" else None
    about = parse(header, path) if header else {}
    found = about.get("inputs") if isinstance(about, dict) else None
    return found if fits(found, INPUTS) else None


def load_weights(
    model: nn.Module,
    weights: str | Path | Mapping[str, Tensor],
    *,
    new_head: bool = False,
    source: str | None = None,
) -> nn.Module:
    """Copy weights into ``model`` (half precision is upcast); returns the model. Nothing is copied where they
    do not fit.

    new_head: the last layer keeps its fresh values where only its shapes differ.
    Raises DataError naming missing, unexpected and differently shaped entries.
    """
    if isinstance(weights, Mapping):
        state, source = dict(weights), source or "the given weights"
    else:
        state, source = read_state_dict(weights)[0], str(weights)
    state = {_strip(key): value for key, value in state.items()}
    target = model.state_dict()
    fresh = {key for key in target if key.endswith("num_batches_tracked")}  # may be missing
    differ = [key for key in state if key in target and state[key].shape != target[key].shape]
    head = _head(model)
    if differ and all(key.rpartition(".")[0] == head and state[key].ndim for key in differ):
        if not new_head:
            have, want = (len(table[differ[0]]) for table in (state, target))
            raise ClassCountError(f"{source} (last layer {head!r})", have, want)
        state = {key: value for key, value in state.items() if key not in differ}
        fresh |= set(differ)
    if problems := misfit(state, target, fresh):
        raise DataError(f"{source} does not fit {type(model).__name__}: {problems}")
    bad = [
        key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if bad:
        raise DataError(f"{source} contains NaN or infinite values in {_few(bad)}")
    model.load_state_dict({**target, **{key: value.to(target[key].dtype) for key, value in state.items()}})
    return model


def misfit(state: Mapping[str, Tensor], target: Mapping[str, Tensor], fresh: Collection[str] = ()) -> str:
    """What of `state` does not go into a network with the state_dict `target`: names that are missing (but
    for those in `fresh`) or unexpected, and shapes that differ. Empty where all is well."""
    missing = [key for key in target if key not in state and key not in fresh]
    unexpected = [key for key in state if key not in target]
    differ = [key for key in state if key in target and state[key].shape != target[key].shape]
    problems = [f"missing {_few(missing)}"] if missing else []
    problems += [f"unexpected {_few(unexpected)}"] if unexpected else []
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, the model {tuple(target[key].shape)}"
        for key in differ[:3]
    ]
    return "; ".join(problems)


def _strip(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _head(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
