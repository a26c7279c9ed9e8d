"""Error curves: how the error of one layer falls as its ranks, and with them its cost, rise."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdlib.decompositions.linalg import magnitude
from tdlib.errors import DataError, TdlibError
from tdlib.formats import Ranks
from tdlib.formats.base import finite
from tdlib.planning.candidates import Candidate

Point = tuple[Ranks | None, float, float]
LARGE = 1024  # rows of a matrix whose eigenvectors take seconds


@dataclass(frozen=True)
class Curve:
    """points: (ranks, cost, error) along which cost rises and error falls, all of them ranks that the layer
    may have (multiples where they are asked for). error: the same error at any ranks."""

    points: Sequence[Point]
    error: Callable[[Ranks], float]

    def scaled(self, change: Callable[[float], float]) -> Curve:
        """The curve with `change`, a rising function, of its errors."""
        points = [(ranks, cost, change(error)) for ranks, cost, error in self.points]
        return Curve(points, lambda ranks: change(self.error(ranks)))


def weight_curve(candidate: Candidate, weight: Tensor, steps: int = 128) -> Curve:
    """Squared error relative to the kernel's norm, from rank 1 (or the multiple) up to the dense cost.

    The error is the sum of the squared singular values cut off in every unfolding (exact for one, an upper
    bound for several). The path raises the rank that saves most error per unit of cost. Formats without
    unfoldings are measured.
    """
    tails = _tails(candidate, weight.float())  # errors to be compared, not targets: single precision will do
    if tails is None:
        return measured_curve(candidate, weight)
    ranks, m = candidate.clip((1,) * len(tails)), candidate.multiple
    strides = [m * max(1, len(t) // (m * steps)) for t in tails]

    def cut(r: Ranks) -> list[float]:
        return [tail[min(n, len(tail) - 1)] for tail, n in zip(tails, r, strict=True)]

    def error(r: Ranks) -> float:
        return min(1.0, sum(cut(r)))

    points: list[Point] = []
    while candidate.cost(ranks) < candidate.cost(None):
        points.append((ranks, candidate.cost(ranks), error(ranks)))
        options = []
        for k, stride in enumerate(strides):
            raised = candidate.clip(tuple(r + stride * (j == k) for j, r in enumerate(ranks)))
            added = candidate.cost(raised) - candidate.cost(ranks)
            saved = sum(a - b for a, b in zip(cut(ranks), cut(raised), strict=True))
            if added > 0:
                options.append((saved / added, raised))
        if not options:
            break
        ranks = max(options, key=lambda option: option[0])[1]
    return Curve(points, error)


def measured_curve(candidate: Candidate, weight: Tensor, measured: int = 5, steps: int = 64) -> Curve:
    """The same along the format's uniform family: measured at a few ranks, log-linear in cost between
    them."""
    grid: dict[Ranks, float] = {}
    for k in range(steps + 1):
        ranks = candidate.uniform(k / steps)
        if candidate.cost(ranks) < candidate.cost(None):
            grid[ranks] = candidate.cost(ranks)
    rows = sorted(grid.items(), key=lambda item: item[1])
    chosen = sorted({round(k * (len(rows) - 1) / (measured - 1)) for k in range(measured)})
    known: list[tuple[float, float]] = []
    for k in chosen:
        error = max(1e-12, candidate.kernel.error(weight, rows[k][0]))
        known.append((rows[k][1], min(error, known[-1][1] if known else 1.0)))
    points = [(ranks, cost, _between(known, cost)) for ranks, cost in rows]
    return Curve(points, lambda ranks: _between(known, candidate.cost(ranks)))


def _between(known: Sequence[tuple[float, float]], cost: float) -> float:
    """Error at `cost`, log-linear between the known (cost, error)."""
    for (c0, e0), (c1, e1) in itertools.pairwise(known):
        if c0 <= cost <= c1 and c1 > c0:
            share = (cost - c0) / (c1 - c0)
            return math.exp((1 - share) * math.log(e0) + share * math.log(e1))
    return known[0][1] if cost <= known[0][0] else known[-1][1]


def harm(curve: Curve) -> Curve:
    """The curve with -log(1 - error) for the error, which adds up over layers.

    1 - error is the share of a layer's energy that survives. Shares multiply along a network: one layer that
    is lost loses everything, which a plain sum of errors would accept.
    """
    return curve.scaled(lambda error: -math.log1p(-min(error, 1 - 1e-6)))


def whitened(candidate: Candidate, statistics: Mapping[str, Tensor] | None) -> Tensor:
    """The kernel times the root of its inputs' second moments, so that its plain norm is the norm of the
    output.

    For a convolution Σ is taken as (channels) ⊗ (positions in the patch), which keeps the kernel's modes;
    exact for 1×1 and linear layers. Without statistics the kernel itself.
    """
    weight = finite_weight(candidate)
    if statistics is None:
        return weight
    if candidate.name not in statistics:
        raise DataError(f"statistics lack layer {candidate.name!r}")
    inputs, patch = weight.shape[1], math.prod(weight.shape[2:])
    sigma = statistics[candidate.name].to(weight).reshape(inputs, patch, inputs, patch)
    channels = sigma.diagonal(dim1=1, dim2=3).sum(-1)
    positions = sigma.diagonal(dim1=0, dim2=2).sum(-1)
    flat = weight.reshape(weight.shape[0], inputs, patch)
    roots = _root(channels), _root(positions / channels.trace().clamp_min(torch.finfo(weight.dtype).tiny))
    return torch.einsum("oik,ij,kl->ojl", flat, *roots).reshape(weight.shape)


def harm_curve(
    candidate: Candidate, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Curve:
    """1/2 tr(H D Σ D^T) along the path of best gain per cost, with D the kernel's error.

    weights: layer → H (O, O), the Fisher information at its output; the result is then the KL divergence at
    the network's output to second order.
    """
    kernel = whitened(candidate, statistics)
    half = _root(weights[candidate.name].to(kernel)).mT
    kernel = (half @ kernel.flatten(1)).reshape(kernel.shape)
    total = 0.5 * float(kernel.square().sum())
    return weight_curve(candidate, kernel).scaled(lambda error: max(1e-8, error) * total)


def finite_weight(candidate: Candidate) -> Tensor:
    """The layer's kernel in float64. Raises NonFiniteError naming the layer."""
    return finite(candidate.weight, candidate.name).double()


def kept_energy(candidate: Candidate) -> Callable[[float], Ranks]:
    """share → the smallest ranks that keep it."""
    weight = finite_weight(candidate)
    tails = _tails(candidate, weight)
    if tails is None:
        curve = measured_curve(candidate, weight)
        return lambda share: (
            next((p[0] for p in curve.points if p[2] <= 1 - share), candidate.bounds) or candidate.bounds
        )
    rising = [[-t for t in tail] for tail in tails]
    return lambda share: tuple(max(1, bisect_left(tail, share - 1)) for tail in rising)


def _tails(candidate: Candidate, weight: Tensor) -> list[list[float]] | None:
    """For every rank: tail[r] = share of squared singular values beyond r, r = 0, ..., bound."""
    matrices = candidate.kernel.unfoldings(weight)
    if matrices is None:
        return None
    tails = []
    for m in matrices:
        m = m / magnitude(m)
        gram = m @ m.mT if m.shape[0] <= m.shape[1] else m.mT @ m
        values = torch.linalg.eigvalsh(gram).clamp_min(0).cpu()  # ascending
        total = values.sum().clamp_min(torch.finfo(values.dtype).tiny)
        below = torch.cat([torch.zeros(1, dtype=values.dtype), values.cumsum(0)])
        tails.append((below / total).flip(0).tolist())
    return tails


def unfoldings(candidate: Candidate, rule: str) -> list[Tensor]:
    """One matrix per rank, for a rule that cannot do without."""
    matrices = candidate.kernel.unfoldings(finite_weight(candidate))
    if matrices is None:
        raise TdlibError(
            f"rule {rule!r} needs the singular values of unfoldings, "
            f"which format {candidate.kernel.name!r} has not; "
            "use uniform, energy or global"
        )
    return matrices


def _root(matrix: Tensor) -> Tensor:
    """R with R R^T = matrix: the symmetric root, or for a `LARGE` positive definite matrix its Cholesky
    factor, twenty times cheaper. Singular values along whole channels are the same with either."""
    if len(matrix) > LARGE:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
