"""Weights from local files: safetensors, or a state_dict read with ``weights_only=True`` (no code is
unpickled).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tdlib.errors import ClassCountError, DataError

PREFIXES = ("module.", "_orig_mod.", "model.")  # left by DataParallel, torch.compile and Lightning


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header metadata) of a weight file. Raises DataError."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"weight file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise DataError(
            f"{path} cannot be read as weights (safetensors or a plain state_dict): {error}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DataError(f"{path} holds no state_dict (a mapping from parameter names to tensors)")
    return dict(found), {}


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
    counters = {key for key in target if key.endswith("num_batches_tracked")}
    missing = [key for key in target if key not in state and key not in counters]
    unexpected = [key for key in state if key not in target]
    differ = [key for key in state if key in target and state[key].shape != target[key].shape]
    head = _head(model)
    if differ and all(key.rpartition(".")[0] == head for key in differ):
        if new_head:
            state = {key: value for key, value in state.items() if key not in differ}
            differ = []
        else:
            have, want = (len(table[differ[0]]) for table in (state, target))
            raise ClassCountError(f"{source} (last layer {head!r})", have, want)
    problems = [f"missing {_few(missing)}"] if missing else []
    problems += [f"unexpected {_few(unexpected)}"] if unexpected else []
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, the model {tuple(target[key].shape)}"
        for key in differ[:3]
    ]
    if problems:
        raise DataError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}")
    bad = [
        key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if bad:
        raise DataError(f"{source} contains NaN or infinite values in {_few(bad)}")
    model.load_state_dict({**target, **{key: value.to(target[key].dtype) for key, value in state.items()}})
    return model


def _strip(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _head(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
