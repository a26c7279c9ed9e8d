"""Layers whose kernel is a low-rank tensor after a fixed random permutation of its entries, and their
formats.

The formats ``shuffled-tt``, ``shuffled-tr``, ``shuffled-cp`` and ``shuffled-tucker`` take the options

    seed      of the permutation (default 0): all that is stored of it
    shuffle   False leaves the entries in place: the unshuffled counterpart with exactly as many parameters
    order     number of near-equal modes (default 4), or
    modes     their extents, or "kernel" for the kernel's own (O, I, kh, kw)

The forward pass contracts the factors to the kernel (once per call, and in evaluation once until a factor
changes) and convolves with it. So these layers save parameters, not MACs: permuted entries leave no channel
structure to contract with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..errors import CheckpointError, RankError, unknown
from ..tensor import shuffled as maths
from .chains import Layer, bias_of, finish, parameter
from .scheme import KINDS, Factors, Format, Ranks, Scheme, Shape

UNSHUFFLED = -1  # how "no permutation" is written into a state_dict
OPTIONS = ("seed", "shuffle", "order", "modes")


class _Shuffled(nn.Module):
    """Factors of the folded tensor, the permutation by its seed, and a bias."""

    shuffle: Tensor  # (seed or -1, CRC-32 of the permutation), saved
    order: Tensor  # (n,) inverse permutation, not saved
    bias: nn.Parameter | None

    def __init__(self, layer: Layer, cores: Sequence[Tensor], kind: str, seed: int | None) -> None:
        super().__init__()
        self.kind, self.shape = kind, tuple(layer.weight.shape)
        self.cores = nn.ParameterList(parameter(layer, core) for core in cores)
        self.register_parameter("bias", bias_of(layer))
        device = layer.weight.device
        self.register_buffer(
            "shuffle", torch.tensor([UNSHUFFLED if seed is None else seed, 0], device=device)
        )
        self.register_buffer("order", None, persistent=False)
        self._draw()
        self._kept: tuple[Any, Tensor] | None = None

    @property
    def seed(self) -> int | None:
        """Seed of the permutation, None without one."""
        seed = int(self.shuffle[0])
        return None if seed == UNSHUFFLED else seed

    def _draw(self, expected: int | None = None) -> None:
        """The permutation of the stored seed. Raises CheckpointError where it is not the one that was trained
        with.
        """
        if self.seed is None:
            return
        n = math.prod(self.shape)
        drawn = maths.checksum(maths.permutation(n, self.seed))
        if expected is not None and drawn != expected:
            raise CheckpointError(
                f"the permutation of {n} entries that seed {self.seed} gives in torch {torch.__version__} is "
                "not the one this layer was trained with; load it with the version of torch that saved it"
            )
        self.order = maths.inverse_permutation(n, self.seed).to(self.shuffle.device)
        self.shuffle[1] = drawn

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "shuffle" in state_dict:
            self.order = None  # type: ignore[assignment]
            self._draw(expected=int(self.shuffle[1]))
        self._kept = None

    def kernel(self) -> Tensor:
        """The dense kernel, differentiable in the factors."""
        flat = maths.FOLDS[self.kind].compose(list(self.cores)).reshape(-1)
        if self.order is not None:
            flat = flat.index_select(0, self.order)
        return flat.reshape(self.shape)

    def _weight(self) -> Tensor:
        """``kernel()``, kept while evaluating until a factor changes."""
        if (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
        ):
            self._kept = None
            return self.kernel()
        if is_in_torch_dispatch_mode() or any(core.is_inference() for core in self.cores):
            return self.kernel()  # a counter must see the products
        state = (
            [(core.data_ptr(), core._version, core.dtype) for core in self.cores],
            torch.is_autocast_enabled(),
        )
        if self._kept is None or self._kept[0] != state:
            self._kept = state, self.kernel()
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}  # type: ignore[misc, unused-ignore]

    @torch.no_grad()
    def reset_parameters(self, gain: float = 2.0) -> None:
        """Normal factors of one variance, such that the kernel's entries have variance gain / fan-in."""
        fan_in = math.prod(self.shape[1:])
        paths = paths_of(self.kind, [tuple(core.shape) for core in self.cores])
        std = (gain / fan_in / paths) ** (0.5 / len(self.cores))
        for core in self.cores:
            core.normal_(0.0, std)

    def extra_repr(self) -> str:
        return (
            f"{self.shape}, {self.kind}, seed={self.seed}, cores={[tuple(core.shape) for core in self.cores]}"
        )


class ShuffledLinear(_Shuffled):
    """A linear layer; input (..., I)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight(), self.bias)


class ShuffledConv2d(_Shuffled):
    """A convolution; input (N, I, H, W)."""

    def __init__(self, layer: nn.Conv2d, cores: Sequence[Tensor], kind: str, seed: int | None) -> None:
        super().__init__(layer, cores, kind, seed)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.padding_mode = layer.padding_mode
        self.border = tuple(layer._reversed_padding_repeated_twice)

    def forward(self, x: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            return F.conv2d(x, self._weight(), self.bias, self.stride, self.padding, self.dilation)
        x = F.pad(x, self.border, mode=self.padding_mode)
        return F.conv2d(x, self._weight(), self.bias, self.stride, 0, self.dilation)


def paths_of(kind: str, shapes: Sequence[Shape]) -> int:
    """Number of products that are summed in one entry of the tensor composed of cores of these shapes."""
    if kind == "cp":
        return shapes[0][1]
    if kind == "tucker":
        return math.prod(shapes[0])
    return math.prod(shape[0] for shape in shapes)


# -- registry -----------------------------------------------------------------------------------------


def _seed(options: Mapping[str, Any]) -> int | None:
    return options["seed"] if options["shuffle"] else None


def _build(kind: str, layer: nn.Module, factors: Factors, **options: Any) -> nn.Module:
    cls = ShuffledLinear if isinstance(layer, nn.Linear) else ShuffledConv2d
    return finish(layer, cls(layer, factors, kind, _seed(options)))  # type: ignore[arg-type]


def _macs(kind: str, shape: Shape, ranks: Ranks, hw_in: Shape, hw_out: Shape, **options: Any) -> int:
    """The dense layer's products and those that contract the factors to the kernel."""
    return math.prod(shape) * math.prod(hw_out) + maths.FOLDS[kind].macs(options["modes"], tuple(ranks))


def _scheme(kind: str) -> Scheme:
    row = maths.FOLDS[kind]
    return Scheme(
        factorise=lambda weight, ranks, **o: row.decompose(maths.fold(weight, o["modes"], _seed(o)), ranks),
        compose=lambda factors, shape, **o: maths.unfold(row.compose(factors), shape, _seed(o)),
        build=partial(_build, kind),
        shapes=lambda shape, ranks, **o: row.shapes(o["modes"], tuple(ranks)),
        macs=partial(_macs, kind),
        bounds=lambda shape, **o: row.bounds(o["modes"]),
        at=lambda shape, fraction, **o: row.at(o["modes"], fraction),
        clip=lambda shape, ranks, **o: row.clip(o["modes"], tuple(ranks)),
        batched=kind != "cp",
    )


@dataclass(frozen=True)
class ShuffledFormat(Format):
    """A format whose options are those of the permutation and the folding."""

    def scheme(self, shape: Sequence[int], **options: Any) -> Scheme:
        return super().scheme(shape)

    def resolve(self, shape: Sequence[int], **options: Any) -> dict[str, Any]:
        """Options made explicit for one kernel: the modes, the seed and whether it is used."""
        for name in options:
            if name not in OPTIONS:
                raise unknown(f"option of format {self.name!r}", name, OPTIONS)
        seed = options.get("seed")
        seed = 0 if seed is None else int(seed)
        if not 0 <= seed < 2**63:
            raise RankError(f"the seed of a permutation is a whole number of at least 0, got {seed}")
        modes = maths.fold_modes(shape, options.get("order"), options.get("modes"))
        return {"modes": modes, "seed": seed, "shuffle": bool(options.get("shuffle", True))}


SHUFFLED = tuple(
    ShuffledFormat(
        f"shuffled-{kind}",
        f"{kind} of the kernel's shuffled, folded entries: fewer parameters, not MACs",
        schemes=dict.fromkeys(KINDS, _scheme(kind)),
        options=OPTIONS,
    )
    for kind in maths.FOLDS
)
