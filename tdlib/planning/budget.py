"""Meet a budget: bisect a one-parameter family of ranks, then adjust single ranks.

A *choice* maps layer names to ranks, None meaning that the layer stays dense. All costs are of the candidate
layers together, in the plan's unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from tdlib.errors import BudgetError
from tdlib.formats import Ranks
from tdlib.planning.candidates import Candidate
from tdlib.planning.skipped import percent

Choice = dict[str, Ranks | None]
TOLERANCE = 0.02


@dataclass(frozen=True)
class Budget:
    """What the candidates may cost: total / ratio - fixed, for a network of `total` of which `fixed` stays
    dense."""

    total: int
    fixed: int
    ratio: float
    by: str

    @property
    def limit(self) -> float:
        """Cost left for the candidates."""
        return self.total / self.ratio - self.fixed

    def ratio_of(self, spent: float) -> float:
        """Whole-network ratio if the candidates cost `spent`."""
        return self.total / (self.fixed + spent)

    def met(self, spent: float) -> bool:
        """Whether the ratio is within 2 % of the target."""
        return abs(self.ratio_of(spent) / self.ratio - 1) <= TOLERANCE


def make_budget(
    total: int, candidates: Sequence[Candidate], ratio: float, by: str, dense: Callable[[], str] = str
) -> Budget:
    """The budget for a target ratio. Raises BudgetError, naming the best reachable ratio and what `dense`
    says of the layers that stay dense anyway, if it cannot be met."""
    fixed = total - sum(c.cost(None) for c in candidates)
    budget = Budget(total, fixed, float(ratio), by)
    least = spent(candidates, smallest(candidates))
    best = math.floor(1000 * budget.ratio_of(least)) / 1000
    if not math.isfinite(budget.ratio) or budget.ratio <= 1:
        raise BudgetError(
            f"a ratio is dense / compressed and must be larger than 1, got {ratio}; "
            f"reachable here: up to {best:.3f} in {by}"
        )
    if budget.ratio > budget.ratio_of(least):
        raise BudgetError(
            f"a ratio of {ratio:g} in {by} cannot be reached: the best reachable is {best:.3f}, "
            f"with every rank at {candidates[0].multiple}; {percent(fixed, total)} of the {by} cannot shrink"
            + (f": {why}" if (why := dense()) else "")
        )
    return budget


def spent(candidates: Sequence[Candidate], choice: Mapping[str, Ranks | None]) -> int:
    """Cost of all candidates under a choice."""
    return sum(c.cost(choice[c.name]) for c in candidates)


def smallest(candidates: Sequence[Candidate]) -> Choice:
    """Every rank at its smallest."""
    return {c.name: c.clip((1,) * len(c.bounds)) for c in candidates}


def fit(candidates: Sequence[Candidate], family: Callable[[float], Choice], budget: Budget) -> Choice:
    """The largest member of a family (monotone in its parameter, 0 to 1) within the budget, adjusted to meet
    it."""
    low, high = 0.0, 1.0
    choice = family(low)
    if spent(candidates, choice) > budget.limit:
        return adjust(candidates, smallest(candidates), budget)
    for _ in range(40):
        middle = (low + high) / 2
        trial = family(middle)
        if spent(candidates, trial) <= budget.limit:
            low, choice = middle, trial
        else:
            high = middle
    return adjust(candidates, choice, budget)


def adjust(candidates: Sequence[Candidate], choice: Mapping[str, Ranks | None], budget: Budget) -> Choice:
    """Spend what is left of the budget on single ranks, the largest step that fits first.

    If that ends more than 2 % off, a wider search over ranks near these. Raises BudgetError with the nearest
    reachable ratios if there is nothing within 2 %.
    """
    result = dict(choice)
    left = budget.limit - spent(candidates, result)
    while left > 0:
        fitting = [
            (cost, c.name, ranks)
            for c in candidates
            for ranks, cost in _steps(c, result[c.name])
            if cost <= left
        ]
        if not fitting:
            break
        cost, name, ranks = max(fitting, key=lambda step: step[0])
        result[name], left = ranks, left - cost
    if left >= 0 and budget.met(budget.limit - left):
        return result
    return _search(candidates, result, budget)


def _steps(candidate: Candidate, ranks: Ranks | None) -> list[tuple[Ranks, int]]:
    """(ranks, added cost) of raising one rank by one step."""
    if ranks is None:
        return []
    found, step = [], candidate.multiple
    for k in range(len(ranks)):
        raised = candidate.clip(tuple(r + step * (j == k) for j, r in enumerate(ranks)))
        added = candidate.cost(raised) - candidate.cost(ranks)
        if added > 0 and candidate.smaller(raised) is not None:
            found.append((raised, added))
    return found


def _search(candidates: Sequence[Candidate], choice: Choice, budget: Budget, bins: int = 500) -> Choice:
    """Ranks near `choice` (and dense) whose sum comes nearest to the budget: dynamic programming over binned
    sums."""
    scale = bins / max(1.0, 1.2 * budget.limit)
    states: dict[int, tuple[int, tuple[Ranks | None, ...]]] = {0: (0, ())}
    floor = [min(cost for _, cost in _near(c, choice[c.name])) for c in candidates]
    for k, candidate in enumerate(candidates):
        options = _near(candidate, choice[candidate.name])
        rest = sum(floor[k + 1 :])
        following: dict[int, tuple[int, tuple[Ranks | None, ...]]] = {}
        for (total, picks), (ranks, cost) in product(states.values(), options):
            reached = total + cost
            slot = min(round((reached + rest) * scale), 2 * bins)
            kept = following.get(slot)
            if kept is None or abs(reached + rest - budget.limit) < abs(kept[0] + rest - budget.limit):
                following[slot] = reached, (*picks, ranks)
        states = following
    total, picks = min(states.values(), key=lambda state: abs(state[0] - budget.limit))
    if not budget.met(total):
        ratios = sorted(budget.ratio_of(cost) for cost, _ in states.values())
        below = max((r for r in ratios if r < budget.ratio), default=None)
        above = min((r for r in ratios if r > budget.ratio), default=None)
        near = " and ".join(f"{r:.3f}" for r in (below, above) if r is not None)
        raise BudgetError(
            f"no ranks give a ratio within 2 % of {budget.ratio:g} in {budget.by}; "
            f"the nearest reachable: {near}"
        )
    return {c.name: ranks for c, ranks in zip(candidates, picks, strict=True)}


def _near(candidate: Candidate, ranks: Ranks | None) -> list[tuple[Ranks | None, int]]:
    """(ranks, cost) of dense and of the ranks around `ranks`, some 200 at most."""
    options: dict[Ranks | None, int] = {None: candidate.cost(None)}
    centre = ranks or candidate.bounds
    reach, m = max(1, int((200 ** (1 / len(centre)) - 1) / 2)), candidate.multiple
    if 3 ** len(centre) > 2000:
        around: list[Ranks] = [tuple(r + m * s for r in centre) for s in range(-20, 21)]
    else:
        around = list(product(*(range(r - m * reach, r + m * reach + 1, m) for r in centre)))
    for trial in around:
        clipped = candidate.clip(tuple(max(1, r) for r in trial))
        if candidate.smaller(clipped) is not None:
            options[clipped] = candidate.cost(clipped)
    return list(options.items())
