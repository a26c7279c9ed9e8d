"""What a decomposition must define so that formats, plans and training can use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Ranks = tuple[int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Decomposition:
    """One decomposition of d-way tensors of extents (n_1, ..., n_d): the functions that all else needs. Pure.

    SVD and CP have one rank, a train its d - 1 inner ones, a ring d with the closing one first, Tucker one a
    mode. `decompose` and `rough` cut ranks as `clip` does, and raise RankError for ranks below 1 or of the
    wrong count; `shapes` and `compose_macs` take ranks that are cut already.
    """

    name: str
    decompose: Callable[[Tensor, Ranks], list[Tensor]]  # factors, a flat list
    compose: Callable[[Sequence[Tensor]], Tensor]  # the tensor (n_1, ..., n_d); differentiable
    shapes: Callable[[Shape, Ranks], list[Shape]]  # extents, ranks -> shapes of the factors
    bounds: Callable[[Shape], Ranks]  # ranks at which it is exact
    uniform: Callable[[Shape, float], Ranks]  # one-parameter family, fraction in (0, 1]
    clip: Callable[[Shape, Ranks], Ranks]  # effective ranks
    compose_macs: Callable[[Shape, Ranks], int]  # multiply-accumulates in the matrix products of `compose`
    unfoldings: Callable[[Tensor], list[Tensor]] | None = None  # per rank, the matrix that governs it, if any
    rough: Callable[[Tensor, Ranks], list[Tensor]] | None = None  # as `decompose`, with less work
    batched: bool = True  # torch.vmap maps `decompose` and `compose`
