"""Kernels that are low-rank tensors after a fixed random permutation of their entries (RsTD).

The formats shuffled-tt, shuffled-tr, shuffled-cp and shuffled-tucker take the options

    seed      of the permutation (default 0): all that is stored of it
    shuffle   False leaves the entries in place: the unshuffled counterpart with exactly as many parameters
    order     number of near-equal modes (default 4), or
    modes     their extents, or "kernel" for the kernel's own (O, I, kh, kw)

Permuted entries leave no channel structure to contract with, so the kernel is composed and convolved with:
these layers save parameters, not MACs. Source: Li et al., ICASSP 2019 (arXiv 1810.13098).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.decompositions.cp import CP
from tdlib.decompositions.permutation import (
    checksum,
    fold,
    fold_modes,
    inverse_permutation,
    permutation,
    unfold,
)
from tdlib.decompositions.tr import TR
from tdlib.decompositions.tt import TT
from tdlib.decompositions.tucker import TUCKER
from tdlib.errors import CheckpointError, RankError
from tdlib.formats.base import KINDS, Factors, Format, KernelFormat, Ranks, Shape, register
from tdlib.formats.chains import Layer
from tdlib.formats.composed import ComposedFormat, Composition, composed

UNSHUFFLED = -1  # how "no permutation" is written into a state_dict


class Shuffled(ComposedFormat):
    """The kernel's entries, permuted and folded to the modes (n_1, ..., n_d)."""

    batched = False  # torch.vmap forbids drawing the permutation

    def resolve(self, options: dict[str, Any]) -> dict[str, Any]:
        seed = options.get("seed", 0)
        if not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
            raise RankError(f"the seed of a permutation is a whole number of at least 0, got {seed!r}")
        modes = fold_modes(self.shape, options.get("order"), options.get("modes"))
        return {"modes": modes, "seed": int(seed), "shuffle": bool(options.get("shuffle", True))}

    @property
    def seed(self) -> int | None:
        """Seed of the permutation, None without one."""
        return self.options["seed"] if self.options["shuffle"] else None

    def layout(self) -> Shape:
        return self.options["modes"]

    def fold(self, weight: Tensor) -> Tensor:
        return fold(weight, self.extents, self.seed)

    def unfold(self, tensor: Tensor) -> Tensor:
        return unfold(tensor, self.shape, self.seed)

    def module(self, layer: Layer, factors: Factors) -> nn.Module:
        return composed(layer, ShuffledComposition(self, factors))


class ShuffledComposition(Composition):
    """Factors -> kernel, with the permutation kept by its seed and checked when loaded."""

    shuffle: Tensor  # (seed or -1, CRC-32 of the permutation), saved
    order: Tensor | None  # (n,) inverse permutation, not saved

    def __init__(self, bound: Shuffled, factors: Factors) -> None:
        super().__init__(bound, factors)
        n, seed = math.prod(bound.shape), bound.seed
        drawn = 0 if seed is None else checksum(permutation(n, seed))
        device = factors[0].device
        kept = torch.tensor([UNSHUFFLED if seed is None else seed, drawn], device=device)
        self.register_buffer("shuffle", kept)
        inverse = None if seed is None else inverse_permutation(n, seed).to(device)
        self.register_buffer("order", inverse, persistent=False)

    def forward(self, *factors: Tensor) -> Tensor:
        flat = self.bound.decomposition.compose(list(factors)).reshape(-1)
        if self.order is not None:
            flat = flat.index_select(0, self.order)
        return flat.reshape(self.bound.shape)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Raises CheckpointError where the seed gives another permutation than it was trained with."""
        saved = state_dict.get(prefix + "shuffle")
        if saved is not None and saved.tolist() != self.shuffle.tolist():
            n, mine, theirs = math.prod(self.bound.shape), self.shuffle.tolist(), saved.tolist()
            mend = (
                f"load it with the version of torch that saved it, not {torch.__version__}"
                if mine[0] == theirs[0]
                else "give the layer the seed of the saved one"
            )
            raise CheckpointError(
                f"{prefix}shuffle: this layer's permutation of {n} entries (seed, checksum: {mine}) is not "
                f"the one that the saved layer was trained with ({theirs}); {mend}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class ShuffledTT(Shuffled):
    decomposition = TT

    def uniform(self, fraction: float) -> Ranks:
        # Equal ranks, as usual for trains of near-equal modes.
        rank = max(1, round(fraction * max(self.bounds, default=1)))
        return self.clip((rank,) * len(self.bounds))


class ShuffledTR(Shuffled):
    decomposition = TR


class ShuffledCP(Shuffled):
    decomposition = CP


class ShuffledTucker(Shuffled):
    decomposition = TUCKER


def _row(name: str, kernel: type[KernelFormat]) -> Format:
    return Format(
        f"shuffled-{name}",
        f"{name} of the kernel's shuffled, folded entries: fewer parameters, not MACs",
        kinds=dict.fromkeys(KINDS, kernel),
        options=("seed", "shuffle", "order", "modes"),
    )


register(
    _row("tt", ShuffledTT), _row("tr", ShuffledTR), _row("cp", ShuffledCP), _row("tucker", ShuffledTucker)
)
