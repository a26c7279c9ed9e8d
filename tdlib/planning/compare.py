"""Two networks side by side: parameters, MACs, bytes on disk and measured latency, per layer and whole."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from tdlib.errors import TdlibError, needs
from tdlib.io import once, size_on_disk
from tdlib.network import provenance
from tdlib.planning.cost import Given, Inputs, call, count, example, untouched

WHOLE = "whole network"
NOTE = (
    "ratio = dense / compressed; the whole network's parameter ratio leaves norm layers out of both sides. "
    "Bytes: safetensors. Latency: median of interleaved runs of this machine, speed-up = dense / compressed."
)


@dataclass(frozen=True)
class Comparison:
    """Rows of a table, the whole network last; milliseconds are None for layers that cannot be timed
    alone."""

    rows: tuple[dict[str, Any], ...]
    input_shape: tuple[Any, ...]
    batch: int
    device: str

    @property
    def whole(self) -> dict[str, Any]:
        """The row of the whole network."""
        return self.rows[-1]

    def to_frame(self) -> Any:
        """pandas table."""
        return needs("pandas", "train").DataFrame(list(self.rows))

    def __str__(self) -> str:
        def number(value: Any, form: str) -> str:
            return "-" if value is None else format(value, form)

        lines = []
        for r in self.rows:
            cells = [r["layer"], r["format"]]
            for unit, form in (("params", ","), ("macs", ","), ("bytes", ","), ("ms", ".3f")):
                ratio = r["speedup"] if unit == "ms" else r[f"{unit}_ratio"]
                cells += [number(r[f"dense_{unit}"], form), number(r[unit], form), number(ratio, ".2f")]
            lines.append(cells)
        units = ("params", "MACs", "bytes", "ms")
        head = ["layer", "format", *(cell for unit in units for cell in (unit, "→", "×"))]
        where = f"Batch {self.batch} of inputs {self.input_shape} on {self.device}."
        align = ("left",) * 2 + ("right",) * 12
        return "\n".join([tabulate(lines, head, disable_numparse=True, colalign=align), NOTE, where])


def compare(
    dense: nn.Module,
    compressed: nn.Module,
    input_shape: Sequence[int] | None = None,
    batch: int = 1,
    repeats: int = 20,
    *,
    example_inputs: Given = None,
) -> Comparison:
    """Compare two networks on one input shape (without batch), or on `example_inputs` as `tdlib.count` takes
    them. Layers are matched by name.

    MACs are for a batch of one; latency is the median of `repeats` runs at `batch` (example inputs are
    repeated), the two networks taking turns. Neither network is changed. Raises: TdlibError if either does
    not run on the input.
    """
    if batch < 1 or repeats < 1:
        raise TdlibError(f"batch and repeats must be at least 1, got {batch} and {repeats}")
    models = dense, compressed
    costs = [count(model, input_shape, example_inputs=example_inputs) for model in models]
    formats = {n: layer.format for model in models for n, layer in provenance(model).layers.items()}
    units = list(dict.fromkeys(_unit(row.name, formats) for cost in costs for row in cost.layers))
    places = [_place(model).device for model in models]
    if places[0] != places[1]:
        raise TdlibError(
            f"the dense network is on {places[0]}, the compressed one on {places[1]}: move them to one "
            "device, or their times say nothing of each other"
        )
    device, rows = places[0], []
    with untouched(dense), untouched(compressed):
        own = [_batch(model, input_shape, example_inputs, batch) for model in models]
        inputs = [_inputs(model, units, y) for model, y in zip(models, own, strict=True)]
        for name in units:
            sizes = [
                (*cost.under(name), _bytes(model, name)) for model, cost in zip(models, costs, strict=True)
            ]
            both = all(name in seen for seen in inputs)
            runs = (
                [_runner(model, name, seen) for model, seen in zip(models, inputs, strict=True)]
                if both
                else []
            )
            rows.append(_row(name, formats.get(name, ""), sizes, _latency(runs, repeats, device)))
        whole = [(cost.params, cost.macs, size_on_disk(m)) for m, cost in zip(models, costs, strict=True)]
        runs = [_call(model, y) for model, y in zip(models, own, strict=True)]
        last = _row(WHOLE, "", whole, _latency(runs, repeats, device))
    last["params_ratio"] = _ratio(costs[0].weights, costs[1].weights)
    return Comparison((*rows, last), costs[0].input_shape, batch, str(device))


def _place(model: nn.Module) -> Tensor:
    """A tensor of the type and on the device of the model's first floating-point parameter."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))


def _batch(model: nn.Module, input_shape: Sequence[int] | None, given: Given, batch: int) -> Inputs:
    """The inputs that `count` takes, repeated."""
    inputs = example(model, input_shape, given)
    if isinstance(inputs, dict):
        return {name: x.repeat_interleave(batch, 0) for name, x in inputs.items()}
    return tuple(x.repeat_interleave(batch, 0) for x in inputs)


def _unit(name: str, formats: dict[str, str]) -> str:
    """The outermost replaced layer that contains the module, or the module itself."""
    inside = [n for n in formats if name == n or name.startswith(n + ".")]
    return min(inside, key=len, default=name)


def _row(
    name: str, format: str, sizes: Sequence[tuple[int, ...]], ms: Sequence[float | None]
) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": name or "(model)", "format": format}
    for unit, a, b in zip(("params", "macs", "bytes"), *sizes, strict=True):
        row |= {f"dense_{unit}": a, unit: b, f"{unit}_ratio": _ratio(a, b)}
    return row | {"dense_ms": ms[0], "ms": ms[1], "speedup": _ratio(*ms)}


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _bytes(model: nn.Module, name: str) -> int:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return 0
    return sum(t.numel() * t.element_size() for t in once(module.state_dict())[0].values())


def _inputs(model: nn.Module, units: Sequence[str], inputs: Inputs) -> dict[str, tuple[Any, ...]]:
    """The positional arguments with which each unit is first called in the network."""
    seen: dict[str, tuple[Any, ...]] = {}
    named = dict(model.named_modules())

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if args and not kwargs:
                seen.setdefault(name, args)

        return hook

    with ExitStack() as hooks:
        for name in units:
            if name in named and name:
                handle = named[name].register_forward_pre_hook(keep(name), with_kwargs=True)
                hooks.callback(handle.remove)
        call(model, inputs)
    return seen


def _runner(model: nn.Module, name: str, inputs: dict[str, tuple[Any, ...]]) -> Callable[[], Any]:
    return _call(model.get_submodule(name), inputs[name])


def _call(module: nn.Module, inputs: Inputs) -> Callable[[], Any]:
    return lambda: call(module, inputs)


def _latency(
    runs: Sequence[Callable[[], Any]], repeats: int, device: torch.device
) -> tuple[float | None, float | None]:
    """Median milliseconds of two functions that take turns, after one warm-up each."""
    if len(runs) != 2:
        return None, None
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for run, kept in zip(runs, times, strict=True):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn:
                kept.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
