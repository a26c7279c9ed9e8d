"""Statistics of a network's layers as one object, and as a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save
from torch import Tensor

from tdlib.errors import CheckpointError, DataError
from tdlib.files import write_atomic


class Statistics(Mapping[str, Tensor]):
    """Layer name -> Sigma (n, n) float64 on the CPU.

    `.means[name]` (n,), `.counts[name]` (patches seen) and, where asked for, `.weights[name]` (O, O): the
    damped Fisher information at the layer's output. With it `plan(rule="global")` counts harm to the
    network's output, and `decompose` minimises it.
    """

    def __init__(
        self,
        sigmas: Mapping[str, Tensor],
        means: Mapping[str, Tensor],
        counts: Mapping[str, int],
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.weights = dict(weights or {})
        self._sigmas, self.means, self.counts = dict(sigmas), dict(means), dict(counts)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._sigmas:
            raise DataError(
                f"no statistics for layer {name!r}; there are some for: {', '.join(self._sigmas) or 'none'}"
            )
        return self._sigmas[name]

    def __contains__(self, name: object) -> bool:
        return name in self._sigmas

    def __iter__(self) -> Iterator[str]:
        return iter(self._sigmas)

    def __len__(self) -> int:
        return len(self._sigmas)

    def __repr__(self) -> str:
        rows = (f"{n}: {len(s)} from {self.counts[n]}" for n, s in self._sigmas.items())
        return f"Statistics({', '.join(rows)})"

    def save(self, path: str | Path, dtype: torch.dtype = torch.float64) -> None:
        """Write a safetensors file, whole or not at all. float32 halves it, at some cost in the smallest
        eigenvalues.
        """
        tensors = {f"sigma.{n}": s.to(dtype).contiguous() for n, s in self._sigmas.items()}
        tensors |= {f"mean.{n}": m.contiguous() for n, m in self.means.items()}
        tensors |= {f"weight.{n}": h.contiguous() for n, h in self.weights.items()}
        metadata = {"tdlib": "statistics", "counts": json.dumps(self.counts)}
        write_atomic(path, save(tensors, metadata=metadata))


def load_statistics(path: str | Path) -> Statistics:
    """Statistics written by `Statistics.save`. Raises: CheckpointError if the file is missing, corrupt or
    foreign.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read statistics from {path}: {error}") from error
    if metadata.get("tdlib") != "statistics":
        raise CheckpointError(f"{path} was not written by Statistics.save")
    sigmas = {k.removeprefix("sigma."): v.double() for k, v in tensors.items() if k.startswith("sigma.")}
    means = {k.removeprefix("mean."): v for k, v in tensors.items() if k.startswith("mean.")}
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    return Statistics(sigmas, means, json.loads(metadata["counts"]), weights)
