"""Error curves for the global choice of ranks, in the unit that matters: harm to the network's output.

A relative error cannot be compared between layers: 10 % in the first convolution ruins a network that does
not notice 30 % in another. The curve of a layer here is the KL divergence between the outputs of the dense
network and of the network with that one layer compressed:

1. predicted along a path of ranks by 1/2 tr(H (W-What) Sigma (W-What)^T), with H the Fisher information at
   the layer's output and Sigma the second moments of its input. The path raises, at every step, the rank that
   saves most per unit of cost, so input and output ranks come out uneven where the layer is;
2. measured at a few ranks of the path, by a forward pass each, and the prediction rescaled in between (it is
   exact for small changes and too optimistic for large ones).

Summed over layers, which is exact to second order, these curves are what `plan(rule="global")` minimises. No
labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.calibration import inputs_of
from tdlib.layers.weighted import factorise_weighted
from tdlib.planning.candidates import Candidate
from tdlib.planning.curves import Point, harm_curve
from tdlib.sensitivity import divergence, logits

FLOOR = 1e-8


class HarmCurves:
    """Candidate layer -> [(ranks, cost, harm), ...], for `plan(..., rule="global", curves=HarmCurves(...))`.

    statistics: layer -> Sigma. weights: layer -> H (damped), or None for the plain output error. batches:
    inputs on which the divergence is measured, at `points` ranks per layer; with 0 points or no batches the
    prediction stands. `rows` collects what was measured: layer, ranks, cost, predicted and measured harm.
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: Mapping[str, Tensor],
        weights: Mapping[str, Tensor] | None = None,
        batches: Iterable[Any] = (),
        points: int = 5,
    ) -> None:
        self.model, self.statistics, self.weights, self.points = model, statistics, weights, points
        self.batches = [inputs_of(b) for b in batches] if points else []
        self.reference = logits(model, self.batches) if self.batches else torch.zeros(0)
        self.rows: list[dict[str, Any]] = []
        self._known: dict[tuple[Any, ...], list[Point]] = {}

    def __call__(self, candidate: Candidate) -> list[Point]:
        key = (candidate.name, candidate.format.name, candidate.by, tuple(sorted(candidate.options.items())))
        if key not in self._known:
            path = harm_curve(candidate, self.statistics, self.weights)
            if self.batches and candidate.format.factorise_sigma is not None:
                path = self.corrected(candidate, path)
            self._known[key] = path
        return self._known[key]

    def corrected(self, candidate: Candidate, path: list[Point]) -> list[Point]:
        """The path with its errors rescaled to the divergence measured at `points` of its ranks."""
        low, high = math.log(path[0][1]), math.log(path[-1][1])
        wanted = [low + (high - low) * (k + 1) / (self.points + 1) for k in range(self.points)]
        chosen = sorted({min(range(len(path)), key=lambda i: abs(math.log(path[i][1]) - x)) for x in wanted})
        ratios = []
        for i in chosen:
            ranks, cost, expected = path[i]
            if ranks is None:
                continue
            found = self.measure(candidate, ranks)
            ratios.append((math.log(cost), math.log(max(found, FLOOR) / max(expected, FLOOR))))
            self.rows.append(
                {
                    "layer": candidate.name,
                    "ranks": list(ranks),
                    "cost": cost,
                    "predicted": expected,
                    "measured": found,
                }
            )
        scaled = [(r, c, e * math.exp(between(ratios, math.log(c)))) for r, c, e in path]
        for k in range(len(scaled) - 2, -1, -1):  # more cost never counts as more harm
            ranks, cost, error = scaled[k]
            scaled[k] = (ranks, cost, max(error, scaled[k + 1][2]))
        return scaled

    def measure(self, candidate: Candidate, ranks: tuple[int, ...]) -> float:
        """KL divergence from the dense network when this layer alone has these ranks."""
        weight = self.model.get_parameter(f"{candidate.name}.weight")
        kept = weight.detach().clone()
        H = None if self.weights is None else self.weights[candidate.name]
        sigma = self.statistics[candidate.name]
        factors = factorise_weighted(candidate.format, kept, ranks, sigma, H, candidate.options)
        try:
            with torch.no_grad():
                weight.copy_(candidate.format.compose(factors, candidate.shape, **candidate.options))
            return divergence(self.reference, logits(self.model, self.batches))
        finally:
            with torch.no_grad():
                weight.copy_(kept)


def between(known: list[tuple[float, float]], x: float) -> float:
    """Linear interpolation of (x, y) pairs with rising x; constant outside."""
    if x <= known[0][0]:
        return known[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(known):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-12)
    return known[-1][1]
