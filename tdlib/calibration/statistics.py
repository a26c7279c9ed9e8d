"""Input statistics of every layer, streamed by forward hooks in one pass over calibration data; their file.

Sigma = E[x x^T], uncentred, and the mean E[x] of the input patches of every convolution (groups 1) and of the
inputs of every Linear. Patches follow stride, dilation, padding and padding_mode, all positions weigh the
same, and their order is that of `weight.reshape(O, -1)`: channel, kh, kw. Products are float32, totals
float64. How the products are formed is in `tdlib.calibration.moments`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdlib import memory
from tdlib.calibration.moments import Moments, accumulator
from tdlib.calibration.passes import inputs, run
from tdlib.calibration.sensitivity import TEMPERATURE, damped, fisher
from tdlib.errors import CheckpointError, DataError
from tdlib.files import SUM, fits, parse, read_tensors, write_tensors
from tdlib.formats.chains import Conv
from tdlib.network import check_layered

VERSION = "2"  # of the file; the first ones had none, and no SHA-256


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
        counts = json.dumps(self.counts)
        write_tensors(path, tensors, {"tdlib": "statistics", "version": VERSION, "counts": counts})


def load_statistics(path: str | Path) -> Statistics:
    """Statistics written by `Statistics.save`. Raises: CheckpointError if the file is missing, damaged,
    foreign or incomplete.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("tdlib") != "statistics":
        raise CheckpointError(f"{path} was not written by Statistics.save")
    if metadata.get("version", VERSION) != VERSION:
        raise CheckpointError(
            f"{path} has version {metadata['version']}; this version of tdlib reads {VERSION}"
        )
    if "version" in metadata and SUM not in metadata:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is gone")
    parts: dict[str, dict[str, Tensor]] = {"sigma": {}, "mean": {}, "weight": {}}
    for name, value in tensors.items():
        part, _, layer = name.partition(".")
        if part not in parts or not value.is_floating_point():
            raise CheckpointError(f"{path} holds {name} of type {value.dtype}, which is no statistic")
        parts[part][layer] = value
    counts = parse(metadata.get("counts", ""), path)
    if not fits(counts, {str: int}):
        raise CheckpointError(f"{path}: the counts of patches are no whole numbers")
    sigmas, means, weights = parts.values()
    if not set(sigmas) == set(means) == set(counts) >= set(weights):
        raise CheckpointError(f"{path} is incomplete: not every layer has Sigma, mean and count")
    for name, sigma in sigmas.items():
        n, weight = means[name].numel(), weights.get(name, sigma)
        square = weight.ndim == 2 and weight.shape[0] == weight.shape[1]
        if sigma.shape != (n, n) or means[name].shape != (n,) or counts[name] < 1 or not square:
            raise CheckpointError(f"{path}: Sigma, mean and count of layer {name!r} do not go together")
        if not all(bool(x.isfinite().all()) for x in (sigma, means[name], weight)):
            raise CheckpointError(f"{path}: the statistics of layer {name!r} hold NaN or Inf")
        if not torch.allclose(sigma, sigma.T) or not torch.allclose(weight, weight.T):
            raise CheckpointError(f"{path}: a second moment of layer {name!r} is not symmetric")
    return Statistics({n: s.double() for n, s in sigmas.items()}, means, counts, weights)


def statistics(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Iterable[str] | None = None,
    *,
    positions: int | None = None,
    output_weights: bool = False,
    seed: int = 0,
    progress: bool = False,
    memory_limit: float | None = None,
) -> Statistics:
    """Input statistics of the model's layers over `batches` of inputs (or of (inputs, labels) pairs).

    layers: names or globs; all Linear and convolutions of one group if None. positions: at most this many
    random output positions of every image (drawn from `seed`) instead of all; the relative error of Sigma
    falls as 1/sqrt(images * positions). output_weights: also take the Fisher information at the layers'
    outputs (`Statistics.weights`). progress: show bars. memory_limit: bytes that the matrices may take, by
    default 80 % of what is free; estimated before the first pass. Layers that saw fewer patches than Sigma
    has rows warn and are shrunk, see `shrinkage_for`. Layers that `batches` never reach (unused in eval mode,
    or their weight is used directly) are left out with one warning.

    Runs in eval mode and restores every module's mode.
    Raises: DataError for no batch or no layer, or one named in full that is never reached; NonFiniteError
    naming the layer whose input is not finite; MemoryLimitError.
    """
    patterns = ["*"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    chosen = measurable(model, patterns)
    require_memory(chosen, output_weights, memory_limit)
    generator = torch.Generator().manual_seed(seed)
    if output_weights:
        batches = list(inputs(batches))  # gone through twice
    moments = {n: accumulator(m, n, positions, generator) for n, m in chosen.items()}
    run(model, inputs(batches, "statistics", progress), {n: m.update for n, m in moments.items()})
    leave_out([n for n, m in moments.items() if m.count == 0], moments, patterns)
    sigmas, means, counts = {}, {}, {}
    for name in list(moments):
        moment = moments.pop(name)  # its sums are as large as Sigma
        sigma, means[name] = moment.result()
        counts[name] = moment.count
        sigmas[name] = shrink(sigma, shrinkage_for(name, len(sigma), moment.count))
    if not output_weights:
        return Statistics(sigmas, means, counts)
    again = inputs(batches, "sensitivity", progress)
    found = fisher(model, again, list(sigmas), temperature=TEMPERATURE, seed=seed)
    return Statistics(sigmas, means, counts, {n: damped(h) for n, h in found.items()})


def measurable(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Name -> module of the layers whose statistics can be taken and that match a name or glob. Raises:
    DataError."""
    check_layered(model)
    known: dict[str, nn.Module] = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, Conv) and m.groups == 1)
        if not m.weight.is_complex()
    }
    if not known:
        raise DataError("the model has no Linear or convolution (groups 1) to take statistics of")
    if any(p.is_meta for p in model.parameters()):
        raise DataError("the model is on the meta device, without values: load its weights first")
    for pattern in patterns:
        if not any(fnmatch(n, pattern) for n in known):
            raise DataError(
                f"no Linear or convolution (groups 1) matches {pattern!r}; there are: {', '.join(known)}"
            )
    return {n: m for n, m in known.items() if any(fnmatch(n, p) for p in patterns)}


def require_memory(
    layers: Mapping[str, nn.Module], output_weights: bool, limit: float | None, spare: int = 2
) -> None:
    """Raises MemoryLimitError where float64 matrices do not fit: Sigma (n, n) of every layer, with
    `output_weights` H (O, O), and `spare` more of the largest (n, n) to work with."""
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    sigmas = {name: 8 * W[0].numel() ** 2 for name, W in weights.items()}
    widest = sorted(sigmas, key=lambda name: -sigmas[name])[:3]
    need = sum(sigmas.values()) + spare * sigmas[widest[0]]
    if output_weights:
        need += sum(8 * len(W) ** 2 for W in weights.values())
    listed = ", ".join(f"{name} {sigmas[name] / 2**30:.2g} GiB" for name in widest)
    memory.require(
        need,
        f"work with Sigma of {len(weights)} layers (the largest: {listed})",
        "leave the widest layers out (`layers` of statistics, `skip` of plan and compress), or take some at "
        "a time; `positions` and fewer inputs do not make Sigma smaller",
        limit=limit,
        device=weights[widest[0]].device,
    )


def leave_out(missed: list[str], moments: dict[str, Moments], patterns: Sequence[str]) -> None:
    """Drop the layers that were never reached, with one warning. Raises: DataError where one of them is named
    in full among the patterns, or where none is left."""
    why = "the calibration data never reaches them (unused in eval mode, or their weight is used directly)"
    named = sorted(set(missed) & set(patterns))
    if named or len(missed) == len(moments):
        raise DataError(f"no statistics of {', '.join(named or missed)}: {why}; leave them out of `layers`")
    for name in missed:
        del moments[name]
    if missed:
        warnings.warn(f"layers left out of the statistics: {', '.join(missed)}; {why}", stacklevel=3)


def shrinkage_for(name: str, size: int, count: int) -> float:
    """0 if there are at least as many patches as rows of Sigma, else a warning and 0.1 * size / (size +
    count).
    """
    if count >= size:
        return 0.0
    amount = 0.1 * size / (size + count)
    warnings.warn(
        f"layer {name!r}: Sigma is {size} x {size} but the calibration data gave only {count} patches; it is "
        f"shrunk by {amount:.3f} towards a multiple of the identity. Use more images.",
        stacklevel=3,
    )
    return amount


def shrink(sigma: Tensor, amount: float, scale: Tensor | None = None) -> Tensor:
    """(1 - amount) Sigma + amount * scale * I; scale: the mean of Sigma's diagonal if None."""
    if amount == 0:
        return sigma
    ridge = amount * (sigma.diagonal().mean() if scale is None else scale)
    sigma = sigma * (1 - amount)
    sigma.diagonal().add_(ridge)
    return sigma
