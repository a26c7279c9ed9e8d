"""Ranks for the next pass of an iterative compression: a step down from the ranks that every layer has now.

Two rules of Gusak et al., ICCV Workshops 2019 (arXiv 1903.09973), for a mode whose extent is R now:

    "vbmf"  r = R - w (R - r_v),  r_v the rank that EVBMF finds in the unfolding, weakening w in (0, 1]    (1)
    "nx"    r_in, r_out = b r_in  with r_in I + r_in r_out K + r_out O = (parameters now) / x,             (2)
            b = max(0.8 O / I, 1)

None falls below a lower bound (`lowest`).

A *choice* maps layer names to ranks, None meaning that the layer is dense (see `budget`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from tdlib.decompositions.ranks import evbmf_rank
from tdlib.errors import BudgetError, TdlibError, unknown
from tdlib.formats import SPATIAL, Ranks, kind_of
from tdlib.planning.budget import Budget, Choice, spent
from tdlib.planning.candidates import Candidate

RULES = ("vbmf", "nx")


def weaken(size: int, rank: int, weakening: float, least: int = 1) -> int:
    """Equation (1); an EVBMF rank of 0 (nothing but noise found) keeps the extent, as do extents up to
    `least`.
    """
    if rank <= 0:
        return size
    return max(min(least, size), int(size - weakening * (size - rank)))


def tucker_ranks(shape: Sequence[int], params: float, coupling: float) -> Ranks:
    """Equation (2): the largest (r_out, r_in) with r_out = coupling * r_in and at most `params`."""
    o, i, k = shape[0], shape[1], math.prod(shape[2:])
    b = i + coupling * o
    r_in = (math.sqrt(b * b + 4 * coupling * k * params) - b) / (2 * coupling * k)
    return max(1, int(coupling * r_in)), max(1, int(r_in))


def coupling_of(shape: Sequence[int]) -> float:
    """b = r_out / r_in of (2)."""
    return max(0.8 * shape[0] / shape[1], 1.0)


def lowest(site: Candidate, least: int | None) -> Ranks:
    """The ranks below which a layer is not taken: `least`, or its full rank where that is less.

    None: those of the authors' code, 8 for Tucker-2 and linear layers, 2 for CP and 1×1 convolutions (the 21
    of its `weaken_rank` is a default that all its layers override).
    """
    small = 2 if kind_of(site.kernel.shape) != "linear" and len(site.bounds) == 1 else 8
    return tuple(min(small if least is None else least, bound) for bound in site.bounds)


def sizes_of(site: Candidate, now: Ranks | None) -> Ranks:
    """Extents that the next ranks start from: the present ranks; for a dense layer the channels (CP: the rank
    at which the chain has the dense layer's parameters)."""
    if now is not None:
        return now
    return site.uniform(1.0) if _one_rank_conv(site) else site.bounds


def found_by_evbmf(site: Candidate, core: Tensor) -> Ranks:
    """EVBMF's rank of every governed unfolding of `core`, for CP the larger of the two."""
    if kind_of(site.kernel.shape) not in SPATIAL:
        return (evbmf_rank(core.flatten(1)),)
    both = evbmf_rank(core.flatten(1)), evbmf_rank(core.transpose(0, 1).flatten(1))
    return (max(both),) if _one_rank_conv(site) else both


def next_ranks(
    site: Candidate,
    now: Ranks | None,
    core: Tensor,
    rule: str,
    weakening: float,
    factor: float,
    least: int | None,
) -> Ranks:
    """Ranks of one layer one step on by (1) or (2). core: the kernel, or what is decomposed again of its
    chain.
    """
    sizes, low = sizes_of(site, now), lowest(site, least)
    if rule == "vbmf":
        found = found_by_evbmf(site, core)
        return tuple(weaken(n, rank, weakening, m) for n, rank, m in zip(sizes, found, low, strict=True))
    params = site.both(now)[0] / factor
    if len(sizes) == 1:
        ranks: Ranks = (int(params / site.both((1,))[0]),)
    else:
        ranks = tucker_ranks(site.kernel.shape, params, coupling_of(site.kernel.shape))
    return tuple(min(size, max(rank, m)) for size, rank, m in zip(sizes, ranks, low, strict=True))


def accept(sites: Sequence[Candidate], now: Choice, wanted: Mapping[str, Ranks | None]) -> Choice:
    """`wanted`, but the present ranks for a layer that would not become cheaper."""
    return {s.name: _cheaper(s, wanted[s.name], now[s.name]) for s in sites}


def trim(sites: Sequence[Candidate], now: Choice, wanted: Choice, budget: Budget) -> Choice:
    """`wanted`, or if that falls below the budget, ranks between those of now and the wanted ones that meet
    it.

    First a common fraction of the way for all layers, then the single step by one rank that comes closest,
    repeated.
    """
    if spent(sites, wanted) >= budget.limit:
        return wanted
    near, far = 0.0, 1.0  # shares of the way: over and under the budget
    for _ in range(30):
        middle = (near + far) / 2
        over = spent(sites, _part_way(sites, now, wanted, middle)) > budget.limit
        near, far = (middle, far) if over else (near, middle)
    best = min(
        (_part_way(sites, now, wanted, t) for t in (near, far)),
        key=lambda c: abs(spent(sites, c) - budget.limit),
    )
    while True:
        steps = [step for site in sites for step in _single_steps(site, best, now, wanted)]
        closest = min([best, *steps], key=lambda c: abs(spent(sites, c) - budget.limit))
        if closest is best:
            return best
        best = closest


def check_reachable(sites: Sequence[Candidate], budget: Budget, least: int | None) -> None:
    """Raises BudgetError, naming the best reachable ratio, where ranks of at least `least` cannot meet the
    budget.
    """
    dense: Choice = dict.fromkeys((s.name for s in sites), None)
    bottom = accept(sites, dense, {s.name: lowest(s, least) for s in sites})
    best = budget.ratio_of(spent(sites, bottom))
    if best < budget.ratio * 0.98:
        bound = "8 (CP and 1×1 convolutions: 2), the authors' bounds" if least is None else least
        lower = "give lower ones, as in `least=2`" if least is None else "lower `least`"
        raise BudgetError(
            f"a ratio of {budget.ratio:g} in {budget.by} cannot be reached with ranks of at least {bound}: "
            f"the best is {math.floor(1000 * best) / 1000}; ask for less, {lower}, or skip fewer layers"
        )


def check_rule(rule: str, weakening: float | None, factor: float, least: int | None) -> None:
    """Raises UnknownName or TdlibError for settings with which no pass would make progress, or that the rule
    would ignore.
    """
    if rule not in RULES:
        raise unknown("rank rule", rule, RULES)
    if weakening is not None and rule != "vbmf":
        raise TdlibError(f"weakening={weakening} belongs to rule 'vbmf' and would be ignored by {rule!r}")
    if (weakening is not None and not 0 < weakening <= 1) or factor <= 1 or (least is not None and least < 1):
        raise TdlibError(
            "need 0 < weakening <= 1, factor > 1 and least >= 1, "
            f"got weakening={weakening}, factor={factor}, least={least}"
        )


def _one_rank_conv(site: Candidate) -> bool:
    return kind_of(site.kernel.shape) in SPATIAL and len(site.bounds) == 1


def _cheaper(site: Candidate, ranks: Ranks | None, now: Ranks | None) -> Ranks | None:
    return ranks if ranks is not None and site.cost(ranks) < site.cost(now) else now


def _part_way(sites: Sequence[Candidate], now: Choice, wanted: Choice, share: float) -> Choice:
    out: Choice = {}
    for site in sites:
        goal, start = wanted[site.name], now[site.name]
        if goal is not None and goal != start:
            pairs = zip(sizes_of(site, start), goal, strict=True)
            goal = _cheaper(site, tuple(max(g, round(s + share * (g - s))) for s, g in pairs), start)
        out[site.name] = goal
    return out


def _single_steps(site: Candidate, choice: Choice, now: Choice, wanted: Choice) -> list[Choice]:
    """The choices that differ by one in one rank of this layer, between the wanted ranks and those of now."""
    ranks, goal = choice[site.name], wanted[site.name]
    if ranks is None or goal is None:
        return []
    ceiling, steps = sizes_of(site, now[site.name]), []
    for k, delta in ((k, d) for k in range(len(ranks)) for d in (-1, 1)):
        moved = tuple(r + delta * (j == k) for j, r in enumerate(ranks))
        if goal[k] <= moved[k] <= ceiling[k] and _cheaper(site, moved, now[site.name]) == moved:
            steps.append({**choice, site.name: moved})
    return steps
