"""What a decomposition must define so that the rest of the library can use it.

A *scheme* is one way to factorise one kind of kernel; a *format* (a row of ``formats.FORMATS``) says
which scheme serves each kind of layer. Everything else (planning, projection in ADMM, replacing layers,
saving) goes through these few functions and never asks for a format by name.

Kernel shapes are torch's: convolution (O, I, kh, kw), linear (O, I). A 1×1 convolution is of the kind
"pointwise". Factors are a flat list of tensors whose shapes are ``Scheme.shapes(...)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.errors import RankError, TdlibError, unknown
from tdlib.layers.chains import Layer

Ranks = tuple[int, ...]
Shape = tuple[int, ...]
Factors = list[Tensor]

KINDS = ("conv", "pointwise", "linear")


def kind_of(shape: Sequence[int]) -> str:
    """The kind of a kernel shape: "linear" for (O, I), "pointwise" for (O, I, 1, 1), else "conv"."""
    if len(shape) == 2:
        return "linear"
    if len(shape) == 4:
        return "pointwise" if tuple(shape[2:]) == (1, 1) else "conv"
    raise TdlibError(f"a kernel has shape (O, I) or (O, I, kh, kw), not {tuple(shape)}")


def as_float(weight: Tensor) -> Tensor:
    """The weight in a type that factorisations compute in: float64 as it is, everything else float32."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


@dataclass(frozen=True)
class Scheme:
    """One factorisation of one family of kernels. All functions are pure.

    factorise(weight, ranks, **options) -> factors; compose(factors, shape, **options) -> weight,
        its inverse at full rank.
    build(layer, factors, **options) -> the module that replaces `layer` (an nn.Conv2d or nn.Linear).
    shapes(shape, ranks, **options) -> the shapes of the factors; their sizes add up to the parameters.
    macs(shape, ranks, hw_in, hw_out, **options) -> multiply-accumulates for one input map; a linear layer's
        map is (positions, 1). A 1×1 before a strided convolution is charged at input resolution.
    bounds(shape, **options) -> ranks at which the factorisation is exact.
    at(shape, fraction, **options) -> ranks of the one-parameter uniform family, fraction in (0, 1].
    clip(shape, ranks, **options) -> effective ranks; by default the smaller of request and bound.
    unfoldings(weight, **options) -> one matrix per rank whose singular values govern that rank, or None
        where the format has no such matrices (CP, tensor ring).
    factorise_sigma(weight, ranks, sigma, **options): as factorise, in the norm of the inputs' second moments.
    rough(weight, ranks, **options): as factorise with less work, for the errors that the global rule
    compares.
    on_output(factors, M): factors of the kernel whose output mode is multiplied by M (O, O); None where no
        single factor carries that mode.
    batched: torch.vmap can map factorise and compose over a stack of kernels.
    """

    factorise: Callable[..., Factors]
    compose: Callable[..., Tensor]
    build: Callable[..., nn.Module]
    shapes: Callable[..., list[Shape]]
    macs: Callable[..., int]
    bounds: Callable[..., Ranks]
    at: Callable[..., Ranks]
    clip: Callable[..., Ranks] | None = None
    unfoldings: Callable[..., list[Tensor]] | None = None
    factorise_sigma: Callable[..., Factors] | None = None
    rough: Callable[..., Factors] | None = None
    on_output: Callable[[Factors, Tensor], Factors] | None = None
    batched: bool = True


@dataclass(frozen=True)
class Format:
    """A row of the registry: the scheme for every kind of layer that the format covers.

    `factored` maps kinds to the scheme used when the channel modes are factorised, that is when one of
    the options `out_modes`, `in_modes` or `order` is given (or `always_factored`).
    """

    name: str
    about: str
    schemes: Mapping[str, Scheme]
    factored: Mapping[str, Scheme] = field(default_factory=dict)
    always_factored: frozenset[str] = frozenset()
    options: tuple[str, ...] = ()

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of layers that the format can replace: of "conv", "pointwise", "linear"."""
        return frozenset(self.schemes) | frozenset(self.factored)

    @property
    def batched(self) -> bool:
        """Whether torch.vmap can project a stack of kernels at once, for every kind."""
        return all(scheme.batched for scheme in (*self.schemes.values(), *self.factored.values()))

    @property
    def factorise_sigma(self) -> Callable[..., Factors] | None:
        """factorise(weight, ranks, sigma, **options) in the Σ-norm, or None if no kind has it."""
        has = any(s.factorise_sigma for s in (*self.schemes.values(), *self.factored.values()))
        return self._factorise_sigma if has else None

    def scheme(self, shape: Sequence[int], **options: Any) -> Scheme:
        """The scheme for a kernel of this shape under these options (as `resolve` returns them)."""
        for name in options:
            if name not in self.options:
                raise unknown(f"option of format {self.name!r}", name, self.options)
        kind = kind_of(shape)
        table = self.factored if options or kind in self.always_factored else self.schemes
        if kind not in table:
            raise TdlibError(f"format {self.name!r} does not apply to a {kind} layer of shape {tuple(shape)}")
        return table[kind]

    def resolve(self, shape: Sequence[int], **options: Any) -> dict[str, Any]:
        """Options made explicit for one kernel: `order` becomes out_modes and in_modes (checked)."""
        options = {name: value for name, value in options.items() if value is not None}
        self.scheme(shape, **options)
        if not options and kind_of(shape) not in self.always_factored:
            return {}
        from tdlib.tensor.matrix import factorise_modes

        order = int(options.get("order", 2))
        modes = {}
        for key, size in (("out_modes", shape[0]), ("in_modes", shape[1])):
            chosen = tuple(int(n) for n in options.get(key) or factorise_modes(size, order))
            if math.prod(chosen) != size or min(chosen, default=0) < 1:
                raise RankError(
                    f"{key}={chosen} multiply to {math.prod(chosen)}, but the layer has {size} channels"
                )
            modes[key] = chosen
        return modes

    def factorise(self, weight: Tensor, ranks: Sequence[int], **options: Any) -> Factors:
        """Factors of a dense kernel at (at most) these ranks, in float32 or float64."""
        shape, options = tuple(weight.shape), self.resolve(weight.shape, **options)
        scheme = self.scheme(shape, **options)
        return scheme.factorise(as_float(weight), self.clip(shape, ranks, **options), **options)

    def _factorise_sigma(self, weight: Tensor, ranks: Sequence[int], sigma: Any, **options: Any) -> Factors:
        shape, options = tuple(weight.shape), self.resolve(weight.shape, **options)
        scheme = self.scheme(shape, **options)
        if scheme.factorise_sigma is None:
            raise TdlibError(
                f"format {self.name!r} has no data-aware factorisation for a {kind_of(shape)} layer"
            )
        return scheme.factorise_sigma(as_float(weight), self.clip(shape, ranks, **options), sigma, **options)

    def compose(self, factors: Factors, shape: Sequence[int], **options: Any) -> Tensor:
        """The dense kernel of this shape that the factors stand for."""
        options = self.resolve(shape, **options)
        return self.scheme(shape, **options).compose(factors, tuple(shape), **options)

    def build(self, layer: Layer, factors: Factors, **options: Any) -> nn.Module:
        """The module that computes `layer` through the factors: same device, dtype, mode and bias."""
        shape = tuple(layer.weight.shape)
        options = self.resolve(shape, **options)
        return self.scheme(shape, **options).build(layer, factors, **options)

    def shapes(self, shape: Sequence[int], ranks: Sequence[int], **options: Any) -> list[Shape]:
        """Shapes of the factors at these ranks."""
        options = self.resolve(shape, **options)
        return self.scheme(shape, **options).shapes(tuple(shape), tuple(ranks), **options)

    def cost(
        self,
        shape: Sequence[int],
        ranks: Sequence[int],
        hw_in: Sequence[int] = (1, 1),
        hw_out: Sequence[int] = (1, 1),
        stride: Sequence[int] = (1, 1),
        **options: Any,
    ) -> tuple[int, int]:
        """(parameters, MACs) of the factorised layer in closed form, bias left out.

        hw_in, hw_out: height and width of the input and output map; (positions, 1) for a linear layer.
        `stride` is implied by the two maps and accepted for the caller's convenience.
        """
        options = self.resolve(shape, **options)
        scheme, shape, ranks = self.scheme(shape, **options), tuple(shape), tuple(ranks)
        params = sum(math.prod(s) for s in scheme.shapes(shape, ranks, **options))
        return params, scheme.macs(shape, ranks, tuple(hw_in), tuple(hw_out), **options)

    def bounds(self, shape: Sequence[int], **options: Any) -> Ranks:
        """Ranks beyond which nothing is gained: the factorisation is exact there."""
        options = self.resolve(shape, **options)
        return self.scheme(shape, **options).bounds(tuple(shape), **options)

    def at(self, shape: Sequence[int], fraction: float, **options: Any) -> Ranks:
        """Ranks of the uniform family at `fraction` in (0, 1]; monotone in it."""
        options = self.resolve(shape, **options)
        scheme = self.scheme(shape, **options)
        return self.clip(shape, scheme.at(tuple(shape), float(fraction), **options), **options)

    def clip(self, shape: Sequence[int], ranks: Sequence[int], **options: Any) -> Ranks:
        """Effective ranks: checked (count, whole numbers, at least 1) and cut to the bounds. A new tuple."""
        options = self.resolve(shape, **options)
        scheme = self.scheme(shape, **options)
        bounds = scheme.bounds(tuple(shape), **options)
        given = (ranks,) if isinstance(ranks, int) else tuple(ranks)
        if len(given) != len(bounds):
            raise RankError(
                f"format {self.name!r} needs {len(bounds)} rank(s) for a kernel of shape {tuple(shape)} "
                f"(at most {bounds}), got {given}"
            )
        if any(int(r) != r or r < 1 for r in given):
            raise RankError(
                f"ranks are whole numbers of at least 1, got {given} for a kernel of shape {tuple(shape)}"
            )
        whole = tuple(int(r) for r in given)
        if scheme.clip is not None:
            return scheme.clip(tuple(shape), whole, **options)
        return tuple(min(r, b) for r, b in zip(whole, bounds, strict=True))

    def unfoldings(self, weight: Tensor, **options: Any) -> list[Tensor] | None:
        """One matrix per rank whose singular values govern that rank, or None where there are none."""
        options = self.resolve(weight.shape, **options)
        scheme = self.scheme(weight.shape, **options)
        return None if scheme.unfoldings is None else scheme.unfoldings(as_float(weight), **options)

    def error(self, weight: Tensor, ranks: Sequence[int], **options: Any) -> float:
        """Squared error of a (rough, where there is one) factorisation, relative to the squared norm."""
        shape, options = tuple(weight.shape), self.resolve(weight.shape, **options)
        scheme, weight = self.scheme(shape, **options), weight.float()
        factorise = scheme.rough or scheme.factorise
        factors = factorise(weight, self.clip(shape, ranks, **options), **options)
        rest = weight - scheme.compose(factors, shape, **options)
        return float(rest.double().square().sum() / weight.double().square().sum().clamp_min(1e-300))

    def blank(self, layer: Layer, ranks: Sequence[int], **options: Any) -> nn.Module:
        """The factorised module for `layer` with zero factors: a structure to load weights into."""
        shapes = self.shapes(layer.weight.shape, self.clip(layer.weight.shape, ranks, **options), **options)
        zeros = [torch.zeros(s, dtype=layer.weight.dtype, device=layer.weight.device) for s in shapes]
        return self.build(layer, zeros, **options)
