"""What a format is: a decomposition, a layout that makes a kernel the tensor to decompose, and the layer that
computes with the factors.

A `Format` is a row of the registry. Bound to the shape of one kernel it gives a `KernelFormat`, which answers
everything that planning, projection, replacing, saving and export ask: bounds, ranks, factors, costs, module.
A `LayerPlan` (format, ranks, options) is what a plan holds of each layer, and what is saved.

To add a format, write one file in this folder: a subclass of `KernelFormat` and a call of `register`.

Kernel shapes are torch's: convolution (O, I, kh, kw), in 1-D (O, I, k), in 3-D (O, I, kt, kh, kw), linear
(O, I). A 1×1 convolution is of the kind "pointwise".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tdlib import memory
from tdlib.decompositions.base import Decomposition
from tdlib.decompositions.cores import LARGE
from tdlib.decompositions.linalg import check_ranks
from tdlib.decompositions.modes import factorise_modes, whole_numbers
from tdlib.decompositions.sigma import pinv_root
from tdlib.errors import NonFiniteError, RankError, TdlibError, UnknownName, unknown
from tdlib.formats.chains import Layer

Ranks = tuple[int, ...]
Shape = tuple[int, ...]
Factors = list[Tensor]

SPATIAL = ("conv", "conv1d", "conv3d")
POINTWISE = ("pointwise", "pointwise1d", "pointwise3d")
KINDS = (*SPATIAL, *POINTWISE, "linear")


def kind_of(shape: Sequence[int]) -> str:
    """The kind of a kernel shape: "linear" for (O, I), "pointwise" for (O, I, 1, 1), else "conv"; with
    "1d" or "3d" behind it for (O, I, k) and (O, I, kt, kh, kw)."""
    dimensions = len(shape) - 2
    if dimensions == 0:
        return "linear"
    if dimensions not in (1, 2, 3):
        raise TdlibError(
            f"a kernel has shape (O, I), (O, I, k), (O, I, kh, kw) or (O, I, kt, kh, kw), not {tuple(shape)}"
        )
    kind = "pointwise" if set(shape[2:]) == {1} else "conv"
    return kind if dimensions == 2 else f"{kind}{dimensions}d"


def as_float(weight: Tensor) -> Tensor:
    """The weight in a type that decompositions compute in: float64 as it is, everything else float32."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def finite(weight: Tensor, layer: str) -> Tensor:
    """The weight of this layer, detached. Raises: NonFiniteError naming the layer where it has NaN or Inf, or
    no values at all."""
    weight = weight.detach()
    if weight.is_meta:
        raise NonFiniteError(f"layer {layer!r} is on the meta device, without values: load the weights first")
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"layer {layer!r} has NaN or Inf in its weight")
    return weight


class KernelFormat:
    """A format bound to the shape of one kernel.

    A subclass sets `decomposition` and defines the layout (`layout`, `fold`, `unfold`), the cost (`macs`)
    and the layer (`module`). What it may add: `resolve` for options, `decompose_sigma` and `on_output` for
    factors in the norm of a layer's inputs and outputs.
    """

    decomposition: Decomposition

    def __init__(self, name: str, shape: Sequence[int], options: Mapping[str, Any]) -> None:
        self.name, self.shape = name, tuple(shape)
        self.options = self.resolve(dict(options))
        self.extents = self.layout()

    # -- what a format defines ---------------------------------------------------------------------

    def resolve(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options made explicit for this kernel and checked; they are what is saved."""
        return options

    def layout(self) -> Shape:
        """Extents of the tensor that is decomposed."""
        raise TypeError(f"{type(self).__name__} must define layout")

    def fold(self, weight: Tensor) -> Tensor:
        """Kernel -> the tensor of these extents."""
        return weight.reshape(self.extents)

    def unfold(self, tensor: Tensor) -> Tensor:
        """The inverse of `fold`."""
        return tensor.reshape(self.shape)

    def macs(self, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
        """Multiply-accumulates of the layer for one input; hw_in, hw_out: height and width of its input and
        output map (as many extents as the convolution has dimensions), (positions, 1) for a linear layer."""
        raise TypeError(f"{type(self).__name__} must define macs")

    def module(self, layer: Any, factors: Factors) -> nn.Module:
        """What computes `layer`, a convolution or nn.Linear, through the factors: same device, dtype, mode
        and bias, with a method `kernel()`."""
        raise TypeError(f"{type(self).__name__} must define module")

    #: (weight, ranks, sigma (n, n)) -> factors nearest in the norm of the inputs' second moments.
    decompose_sigma: Any = None
    #: (factors, M (O, O)) -> factors of the kernel whose output mode is multiplied by M.
    on_output: Any = None

    # -- what follows from it ----------------------------------------------------------------------

    @property
    def batched(self) -> bool:
        """Whether torch.vmap maps `project` over a stack of kernels."""
        return self.decomposition.batched

    @cached_property
    def bounds(self) -> Ranks:
        """Ranks beyond which nothing is gained: the factorisation is exact there."""
        return self.decomposition.bounds(self.extents)

    def uniform(self, fraction: float) -> Ranks:
        """Ranks of the one-parameter family at `fraction` in (0, 1]; monotone in it."""
        return self.clip(self.decomposition.uniform(self.extents, float(fraction)))

    def clip(self, ranks: Sequence[int] | int) -> Ranks:
        """Effective ranks: checked (count, whole numbers of at least 1) and cut to the bounds.

        Raises: RankError.
        """
        what = f"format {self.name!r} for a kernel of shape {self.shape} (ranks of at most {self.bounds})"
        return self.decomposition.clip(self.extents, check_ranks(ranks, len(self.bounds), what))

    def shapes(self, ranks: Ranks) -> list[Shape]:
        """Shapes of the factors; their sizes add up to the parameters."""
        return self.decomposition.shapes(self.extents, tuple(ranks))

    def cost(
        self, ranks: Sequence[int], hw_in: Sequence[int] = (1, 1), hw_out: Sequence[int] = (1, 1)
    ) -> tuple[int, int]:
        """(parameters, MACs) of the factorised layer in closed form, bias left out; maps as in `macs`."""
        ranks = tuple(ranks)
        return sum(map(math.prod, self.shapes(ranks))), self.macs(ranks, tuple(hw_in), tuple(hw_out))

    def decompose(
        self,
        weight: Tensor,
        ranks: Sequence[int],
        sigma: Tensor | None = None,
        fisher: Tensor | None = None,
    ) -> Factors:
        """Factors of a kernel at (at most) these ranks, in float32 or float64.

        sigma (n, n), the second moments of the layer's inputs: minimise the error of its output,
        tr((W-What) sigma (W-What)^T), instead of that of the kernel. fisher H (O, O) besides: minimise
        tr(H (W-What) sigma (W-What)^T); it is used where one factor carries the whole output mode and
        undone on that factor (trains over factorised channels have none: there H is left out).
        Raises: RankError; TdlibError for a format without a data-aware decomposition.
        """
        weight, ranks = as_float(weight), self.clip(ranks)
        if sigma is None:
            return self.decomposition.decompose(self.fold(weight), ranks)
        if self.decompose_sigma is None:
            raise TdlibError(
                f"format {self.name!r} has no data-aware decomposition for a {kind_of(self.shape)} layer; "
                "leave `statistics` out or choose tucker2, tt or cp"
            )
        sigma = sigma.to(weight.device)
        if fisher is None or self.on_output is None:
            return self.decompose_sigma(weight, ranks, sigma)
        half, inverse = pinv_root(fisher.to(weight.device))
        scaled = (half @ weight.double().flatten(1)).reshape(self.shape)
        factors = self.decompose_sigma(scaled, ranks, sigma)
        return [f.to(weight.dtype) for f in self.on_output([f.double() for f in factors], inverse)]

    def compose(self, factors: Factors) -> Tensor:
        """The dense kernel that the factors stand for. Differentiable."""
        return self.unfold(self.decomposition.compose(factors))

    def project(self, weight: Tensor, ranks: Sequence[int]) -> Tensor:
        """The kernel of these ranks nearest to `weight` as the decomposition finds it; same shape and dtype.

        torch.vmap maps it over a stack of kernels where the format is `batched`.
        """
        return self.compose(self.decompose(weight, ranks)).to(weight.dtype)

    def unfoldings(self, weight: Tensor) -> list[Tensor] | None:
        """One matrix per rank whose singular values govern that rank, or None where there are none."""
        find = self.decomposition.unfoldings
        return None if find is None else find(self.fold(as_float(weight)))

    def error(self, weight: Tensor, ranks: Sequence[int]) -> float:
        """Squared error of a (rough, where there is one) decomposition, relative to the squared norm."""
        weight = weight.float()
        decompose = self.decomposition.rough or self.decomposition.decompose
        rest = weight - self.compose(decompose(self.fold(weight), self.clip(ranks)))
        return float(rest.double().square().sum() / weight.double().square().sum().clamp_min(1e-300))

    def affordable(self, layer: Layer, ranks: Sequence[int]) -> list[Shape]:
        """Shapes of the factors. Raises: RankError; MemoryLimitError where they would not fit, since the
        ranks of a ring have no bounds to be cut to."""
        shapes, weight = self.shapes(self.clip(ranks)), layer.weight
        need = sum(map(math.prod, shapes)) * weight.element_size()
        if need > max(LARGE, weight.nbytes):
            what = f"format {self.name!r} at ranks {tuple(ranks)} for a kernel of shape {self.shape}"
            memory.require(need, what, "lower the ranks", device=weight.device)
        return shapes

    def blank(self, layer: Layer, ranks: Sequence[int]) -> nn.Module:
        """The factorised module for `layer` with zero factors: a structure to load weights into."""
        zeros = [layer.weight.new_zeros(shape) for shape in self.affordable(layer, ranks)]
        return self.module(layer, zeros)

    def random(self, layer: Layer, ranks: Sequence[int], gain: float = 2.0) -> nn.Module:
        """The same with random factors: the composed kernel's entries have variance gain / fan-in."""
        module: Any = self.blank(layer, ranks)
        module.reset_parameters(gain)
        return module

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.shape}, {self.options})"


@dataclass(frozen=True)
class Format:
    """A row of the registry: what a format makes of each kind of layer.

    kinds: a kind of `KINDS` -> how a kernel of that kind is held. factored: the same where an
    option is given (channels as products of smaller modes). options: names that `bind` takes.
    """

    name: str
    about: str
    kinds: Mapping[str, type[KernelFormat]]
    factored: Mapping[str, type[KernelFormat]] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    @property
    def sigma(self) -> bool:
        """Whether some kind has a data-aware decomposition."""
        every = (*self.kinds.values(), *self.factored.values())
        return any(kind.decompose_sigma is not None for kind in every)

    def check(self, options: Iterable[str]) -> None:
        """Raises UnknownName for an option that the format lacks, with the formats that have it."""
        for name in options:
            if name not in self.options:
                takers = ", ".join(row.name for row in FORMATS.values() if name in row.options)
                mend = f"Leave it out, or take a format that has it: {takers or 'none does'}."
                raise UnknownName(f"{unknown(f'option of format {self.name!r}', name, self.options)} {mend}")

    def bind(self, shape: Sequence[int], **options: Any) -> KernelFormat:
        """The format for kernels of this shape. Raises: UnknownName for an option, RankError for modes that
        do not multiply to the channels, TdlibError for a kind of layer that the format does not cover."""
        self.check(options)
        given = {name: value for name, value in options.items() if value is not None}
        table = self.factored if given and self.factored else self.kinds
        kind = kind_of(shape)
        if kind not in table:
            raise TdlibError(f"format {self.name!r} does not apply to a {kind} layer of shape {tuple(shape)}")
        return table[kind](self.name, shape, given)


FORMATS: dict[str, Format] = {}


def register(*rows: Format) -> None:
    """Add formats to the registry."""
    FORMATS.update({row.name: row for row in rows})


def get_format(name: str) -> Format:
    """The row of the registry. Raises UnknownName, which lists the valid ones."""
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]


@dataclass(frozen=True)
class LayerPlan:
    """One layer in a format: the name of the format, its ranks and options. Numbers and text only."""

    format: str
    ranks: Ranks
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(self.options).items()}
        object.__setattr__(self, "ranks", tuple(self.ranks))
        object.__setattr__(self, "options", options)

    def __hash__(self) -> int:
        return hash((self.format, self.ranks, tuple(sorted(self.options.items()))))

    def bind(self, shape: Sequence[int]) -> KernelFormat:
        """The format for a kernel of this shape."""
        return get_format(self.format).bind(shape, **self.options)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, for JSON."""
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()}
        return {"format": self.format, "ranks": list(self.ranks), "options": options}

    @classmethod
    def of(cls, value: LayerPlan | Mapping[str, Any]) -> LayerPlan:
        """A plan of one layer given as such or as what `to_dict` wrote. Raises: TdlibError."""
        if isinstance(value, LayerPlan):
            return value
        try:
            return cls(value["format"], tuple(value["ranks"]), value.get("options") or {})
        except (KeyError, TypeError, AttributeError) as error:
            raise TdlibError(
                f"a layer's plan has format, ranks and (perhaps) options, got {value!r}"
            ) from error


def channel_modes(shape: Shape, options: Mapping[str, Any]) -> dict[str, Any]:
    """`out_modes` and `in_modes` as given, or `order` near-equal ones each (2). Raises: RankError."""
    given = [key for key in ("out_modes", "in_modes") if key in options]
    if "order" in options and len(given) == 2:
        raise RankError(
            f"order={options['order']!r} is unused beside out_modes and in_modes: drop order, or one of them"
        )
    modes = {}
    for key, size in (("out_modes", shape[0]), ("in_modes", shape[1])):
        if key in given:
            chosen = whole_numbers(options[key], key)
        else:
            chosen = factorise_modes(size, options.get("order", 2))
        if math.prod(chosen) != size:
            raise RankError(
                f"{key}={chosen} multiply to {math.prod(chosen)}, but the layer has {size} channels"
            )
        modes[key] = chosen
    return modes
