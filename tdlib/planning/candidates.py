"""Which layers of a model can be decomposed, what each costs at any ranks, and why the others stay dense."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, get_args

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tdlib.errors import TdlibError, unknown
from tdlib.formats import Format, KernelFormat, Ranks, get_format, kind_of
from tdlib.formats.chains import Conv, Layer
from tdlib.formats.replace import obstacle
from tdlib.planning.cost import Call, Cost, is_norm, matrices


@dataclass(eq=False)
class Candidate:
    """One layer that the format can replace. `by` is the unit of its costs, "params" or "macs" (bias left
    out)."""

    name: str
    kernel: KernelFormat
    weight: Tensor
    calls: Sequence[Call]
    by: str
    multiple: int = 1  # of which every rank is, where its bound allows
    _costs: dict[Ranks, tuple[int, int]] = field(default_factory=dict, repr=False)

    @property
    def bounds(self) -> Ranks:
        """Ranks at which the factorisation is exact."""
        return self.kernel.bounds

    @property
    def dense(self) -> tuple[int, int]:
        """(params, macs) of the layer as it is."""
        size = self.weight.numel()
        return size, sum(size * n * math.prod(out) for n, _, out in map(self._maps, self.calls))

    def uniform(self, fraction: float) -> Ranks:
        """Ranks of the format's uniform family."""
        return self._aligned(self.kernel.uniform(fraction))

    def clip(self, ranks: Sequence[int]) -> Ranks:
        """Effective ranks."""
        return self._aligned(self.kernel.clip(ranks))

    def _aligned(self, ranks: Ranks) -> Ranks:
        """The nearest multiples; a bound that is no multiple may be reached."""
        if self.multiple == 1:
            return ranks
        m = self.multiple
        near = [min(max(m, m * round(r / m)), b) for r, b in zip(ranks, self.bounds, strict=True)]
        return self.kernel.clip(near)

    def both(self, ranks: Ranks | None) -> tuple[int, int]:
        """(params, macs) at these ranks; None is dense."""
        if ranks is None:
            return self.dense
        if ranks not in self._costs:
            params, macs = self.kernel.cost(ranks)[0], 0
            for n, hw_in, hw_out in map(self._maps, self.calls):
                macs += n * self.kernel.macs(ranks, hw_in, hw_out)
            self._costs[ranks] = params, macs
        return self._costs[ranks]

    def cost(self, ranks: Ranks | None) -> int:
        """Cost at these ranks in the unit of the plan; None is dense."""
        return self.both(ranks)[self.by == "macs"]

    def smaller(self, ranks: Ranks) -> Ranks | None:
        """The ranks if the factorised layer is smaller than the dense one, else None (dense)."""
        return ranks if self.cost(ranks) < self.cost(None) else None

    def _maps(self, call: Call) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """(batch, map in, map out) of a call; a linear layer has (positions, 1)."""
        before, after = call
        if self.weight.ndim == 2:
            positions = math.prod(before[:-1])
            return 1, (positions, 1), (positions, 1)
        size = self.weight.ndim - 2
        return (before[0] if len(before) == self.weight.ndim else 1), before[-size:], after[-size:]


def candidates(
    model: nn.Module,
    cost: Cost,
    format: str,
    by: str,
    skip: Sequence[str],
    options: Mapping[str, Any],
    multiple: int = 1,
) -> tuple[list[Candidate], dict[str, str]]:
    """(layers that can be decomposed, {layer that stays dense: reason}).

    skip: names or globs; each must match a layer. An option may be a mapping from layer names or globs to
    values.
    """
    row = get_format(format)
    for name in options:
        if name not in row.options:
            raise unknown(f"option of format {format!r}", name, row.options)
    if by not in ("params", "macs"):
        raise unknown("unit", by, ("params", "macs"))
    called = {layer.name: layer.calls for layer in cost.layers}
    owners = _owners(model)
    found, skipped = [], {}
    layers = {n: m for n, m in model.named_modules() if _is_layer(m)}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise unknown("layer to skip", pattern, layers)
    for name, layer in layers.items():
        calls = called.get(name, ())
        shared = {o: 0 for p in layer._parameters.values() for o in owners.get(id(p), ()) if o != name}
        reason = _obstacle(layer, row, calls, list(shared))
        if any(fnmatchcase(name, pattern) for pattern in skip):
            reason = "skipped on request"
        if reason:
            skipped[name] = reason
            continue
        chosen = {key: _for_layer(value, name) for key, value in options.items()}
        try:
            kernel = row.bind(layer.weight.shape, **chosen)
        except TdlibError as error:
            raise type(error)(f"layer {name!r}: {error}") from error
        candidate = Candidate(name, kernel, layer.weight.detach(), calls, by, multiple)
        if candidate.smaller(candidate.clip((1,) * len(candidate.bounds))) is None:
            skipped[name] = (
                f"cannot gain: even at rank {multiple} the {format} layer is not smaller than the dense one"
            )
            continue
        found.append(candidate)
    return found, skipped


def end_layers(model: nn.Module) -> tuple[str, ...]:
    """The layers that the papers leave dense: the first convolution (it sees the image), the classifier."""
    convolutions = [name for name, module in model.named_modules() if isinstance(module, Conv)]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(convolutions[:1] + linears[-1:])


def _is_layer(module: nn.Module) -> bool:
    """Whether a reader of the plan expects a word about this module: it has a weight to multiply with, or
    another matrix."""
    if isinstance(module, (*get_args(Layer), nn.modules.conv._ConvNd)):
        return True
    passed_over = is_norm(module) or isinstance(module, parametrize.ParametrizationList)
    return bool(matrices(module)) and not passed_over


def _obstacle(layer: nn.Module, row: Format, calls: Sequence[Call], shared: Sequence[str]) -> str | None:
    """Why the layer cannot be decomposed, or None."""
    name = type(layer).__name__
    if getattr(layer, "transposed", False):
        return f"transposed convolution ({name})"
    if not isinstance(layer, Layer):
        return f"{name} is neither a convolution nor Linear (it holds {', '.join(matrices(layer)[:3])})"
    if getattr(layer, "groups", 1) != 1:
        depthwise = layer.groups == layer.in_channels
        return "depthwise convolution" if depthwise else f"grouped convolution ({layer.groups} groups)"
    if reason := obstacle(layer):
        return reason
    if shared:
        return f"its weight or bias is shared with {', '.join(shared)}"
    if not calls:
        return "never called as a module in the forward pass (unused, or its weight is used directly)"
    if kind_of(layer.weight.shape) not in {*row.kinds, *row.factored}:
        return f"format {row.name!r} does not apply to a {kind_of(layer.weight.shape)} layer"
    return None


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Parameter id → names of the modules that hold it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _for_layer(value: Any, name: str) -> Any:
    """An option's value for one layer: the entry of the first matching name or glob, or the value itself."""
    if not isinstance(value, Mapping):
        return value
    return next((v for pattern, v in value.items() if fnmatchcase(name, pattern)), None)
