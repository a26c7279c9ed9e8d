"""How ranks are chosen: uniform, energy, evbmf and global. Each rule is one function in RULES.

A rule takes the candidates and a budget (None without a target ratio) and returns a choice: layer name →
ranks, or None where the layer stays dense.

The global rule works on *error curves*: for every layer a path of (ranks, cost, error) along which cost
rises and error falls. The errors come from the singular values of the kernel's unfoldings; with statistics
they are those of the layer's output, and weighted by the Fisher information (`Statistics.weights`) they are
the harm done to the output of the network.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from tqdm import tqdm

from tdlib.decompositions.linalg import one_thread, small
from tdlib.decompositions.ranks import evbmf_rank
from tdlib.errors import TdlibError
from tdlib.formats import Ranks
from tdlib.planning.budget import Budget, Choice, adjust, fit
from tdlib.planning.candidates import Candidate
from tdlib.planning.curves import (
    Curve,
    Point,
    harm,
    harm_curve,
    kept_energy,
    unfoldings,
    weight_curve,
    whitened,
)


@dataclass
class Request:
    """Everything a rule may need besides the candidates."""

    budget: Budget | None
    energy: float | None = None
    statistics: Mapping[str, Tensor] | None = None
    progress: bool = False
    reasons: dict[str, str] = field(default_factory=dict)

    def need_budget(self, rule: str) -> Budget:
        """The budget, or an error that says how to give one."""
        if self.budget is None:
            raise TdlibError(
                f"rule {rule!r} needs a target: pass ratio=..., or ranks=... for an explicit table"
            )
        return self.budget


def uniform(candidates: Sequence[Candidate], request: Request) -> Choice:
    """The same fraction of every layer's channels."""
    budget = request.need_budget("uniform")
    return fit(candidates, lambda t: {c.name: c.smaller(c.uniform(t)) for c in candidates}, budget)


def energy(candidates: Sequence[Candidate], request: Request) -> Choice:
    """The smallest ranks that keep the same share of squared singular values in every unfolding.

    The share is `energy`, or found by bisection so that the target ratio is met.
    """
    spectra = {c.name: kept_energy(c) for c in candidates}

    def at(share: float) -> Choice:
        return {c.name: c.smaller(c.clip(spectra[c.name](share))) for c in candidates}

    if request.energy is not None:
        if not 0 < request.energy <= 1:
            raise TdlibError(f"energy is a share in (0, 1], got {request.energy}")
        return at(request.energy)
    budget = request.need_budget("energy")
    # Shares near 1 matter most: a logarithmic scale of what is lost.
    return fit(candidates, lambda t: at(1 - 10 ** (-12 * t)), budget)


def evbmf(candidates: Sequence[Candidate], request: Request) -> Choice:
    """Ranks that the analytic variational Bayes solution keeps (Nakajima et al. 2013); rank 0 leaves a layer
    dense.

    With a target ratio the ranks are weakened towards the bounds, or scaled down, by one factor for all
    layers.
    """
    found: dict[str, Ranks] = {}
    for c in candidates:
        ranks = tuple(int(evbmf_rank(m)) for m in unfoldings(c, "evbmf"))
        if min(ranks) == 0:
            request.reasons[c.name] = "EVBMF finds no signal above the noise (rank 0)"
        else:
            found[c.name] = c.clip(ranks)

    def at(t: float) -> Choice:
        choice: Choice = {}
        for c in candidates:
            ranks = found.get(c.name)
            if ranks is not None:
                if t <= 0.5:
                    ranks = tuple(max(1, round(2 * t * r)) for r in ranks)
                else:
                    ranks = tuple(
                        round(r + (2 * t - 1) * (b - r)) for r, b in zip(ranks, c.bounds, strict=True)
                    )
                ranks = c.smaller(c.clip(ranks))
            choice[c.name] = ranks
        return choice

    return at(0.5) if request.budget is None else fit(candidates, at, request.budget)


def global_(candidates: Sequence[Candidate], request: Request) -> Choice:
    """The budget goes where a unit of cost buys most error reduction, across all layers; uniform ranks where
    they promise less harm still.

    The promise is an estimate, for each layer on its own. With Fisher weights it nearly halves the divergence
    of a ResNet-20 on CIFAR-10; for a ResNet-18 on ImageNet at 2x and 3x it promises a fifth less than uniform
    ranks do, and what was measured is within a fifth of theirs, either way. Without Fisher weights it knows
    nothing of what a layer does to the network.
    """
    budget = request.need_budget("global")
    statistics, weights = request.statistics, getattr(request.statistics, "weights", None)

    def curve(c: Candidate) -> Curve:
        with one_thread(small(c.weight)):
            if statistics is not None and weights:
                return harm_curve(c, statistics, weights)
            return harm(weight_curve(c, whitened(c, statistics)))

    curves = {c.name: curve(c) for c in tqdm(candidates, "ranks", unit="layer", disable=not request.progress)}

    def predicted(choice: Choice) -> float:
        return sum(curves[name].error(ranks) for name, ranks in choice.items() if ranks is not None)

    paths = {name: curve.points for name, curve in curves.items()}
    best = global_ranks(paths, {c.name: c.cost(None) for c in candidates}, budget.limit)
    return min(adjust(candidates, best, budget), uniform(candidates, request), key=predicted)


RULES: dict[str, Callable[[Sequence[Candidate], Request], Choice]] = {
    "uniform": uniform,
    "energy": energy,
    "evbmf": evbmf,
    "global": global_,
}


def global_ranks(curves: Mapping[str, Sequence[Point]], costs: Mapping[str, float], budget: float) -> Choice:
    """Pick one point on every layer's curve so that the summed error is small and the summed cost within
    `budget`.

    curves: layer → points (ranks, cost, error) on a path along which cost rises and error falls, the first
    point being the cheapest; errors of different layers must be comparable (here: squared, relative to the
    layer's norm; any additive estimate of harm will do, such as output error weighted by the loss's
    sensitivity).
    costs: layer → dense cost, the end of every path, with error 0 and ranks None.
    On the lower convex hulls, taking steps in the order of error saved per unit of cost is optimal; what is
    left is spent on the points between hull corners.
    """
    paths = {name: _ends_dense(curve, costs[name]) for name, curve in curves.items()}
    at = dict.fromkeys(paths, 0)
    left = budget - sum(path[0][1] for path in paths.values())
    segments = []
    for name, path in paths.items():
        corners = _hull(path)
        for a, b in itertools.pairwise(corners):
            gain = (path[a][2] - path[b][2]) / (path[b][1] - path[a][1])
            segments.append((gain, name, a, b))
    for _, name, a, b in sorted(segments, key=lambda s: -s[0]):
        if at[name] != a:
            continue
        path = paths[name]
        reachable = [k for k in range(a + 1, b + 1) if path[k][1] - path[a][1] <= left]
        if reachable:
            best = b if b in reachable else min(reachable, key=lambda k: path[k][2])
            left -= path[best][1] - path[a][1]
            at[name] = best
    return {name: path[at[name]][0] for name, path in paths.items()}


def _ends_dense(curve: Sequence[Point], dense: float) -> list[Point]:
    """The curve's points that are cheaper than dense, by rising cost, then the dense one."""
    points = sorted((p for p in curve if p[1] < dense), key=lambda p: (p[1], p[2]))
    return [*points, (None, dense, 0.0)]


def _hull(path: Sequence[Point]) -> list[int]:
    """Indices of the lower convex hull of (cost, error), from the cheapest point on."""
    hull: list[int] = []
    for k, (_, cost, error) in enumerate(path):
        if hull and (cost <= path[hull[-1]][1] or error >= path[hull[-1]][2]):
            continue
        while len(hull) > 1:
            (_, c0, e0), (_, c1, e1) = path[hull[-2]], path[hull[-1]]
            if (e0 - e1) * (cost - c1) > (e1 - error) * (c1 - c0):
                break
            hull.pop()
        hull.append(k)
    return hull
