"""Choose the ranks of every layer so that the whole network meets a budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from tdlib.errors import RankError, TdlibError, unknown
from tdlib.planning.budget import Choice, make_budget
from tdlib.planning.candidates import Candidate, Ranks, candidates
from tdlib.planning.cost import count, table
from tdlib.planning.curves import Curve
from tdlib.planning.rules import RULES, Request

NOTE = (
    "ratio = dense / compressed of the whole network for one input; norm layers' parameters left out of both"
)


@dataclass(frozen=True)
class PlanRow:
    """One planned layer: its format, effective ranks, options, and (params, macs) before and after, without
    bias."""

    format: str
    ranks: Ranks
    options: Mapping[str, Any]
    shape: tuple[int, ...]
    dense: tuple[int, int]
    cost: tuple[int, int]


class Plan(Mapping[str, Ranks]):
    """Layer name → ranks, for the layers to decompose; `skipped` says why the others stay dense.

    params, macs: of the whole network after `decompose`, exactly (params with norm layers); dense_params,
    dense_macs: before. ratio: what the plan really gives in its unit `by`; params_ratio and macs_ratio: in
    either.
    """

    def __init__(
        self,
        rows: Mapping[str, PlanRow],
        *,
        format: str,
        rule: str,
        by: str,
        skipped: Mapping[str, str],
        dense: Mapping[str, int],
    ) -> None:
        self._rows = dict(rows)
        self.format, self.rule, self.by = format, rule, by
        self.skipped = dict(skipped)
        self.dense_params, self.dense_macs, self.bn_params = (
            dense["params"],
            dense["macs"],
            dense["bn_params"],
        )
        self.params = self.dense_params + sum(row.cost[0] - row.dense[0] for row in self._rows.values())
        self.macs = self.dense_macs + sum(row.cost[1] - row.dense[1] for row in self._rows.values())

    def __getitem__(self, name: str) -> Ranks:
        return self._rows[name].ranks

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> dict[str, PlanRow]:
        """Layer name → format, ranks, options, shape and costs."""
        return dict(self._rows)

    @property
    def formats(self) -> dict[str, str]:
        """Layer name → format."""
        return {name: row.format for name, row in self._rows.items()}

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """Layer name → options of its format (factorised modes)."""
        return {name: dict(row.options) for name, row in self._rows.items()}

    @property
    def params_ratio(self) -> float:
        """Dense / compressed parameters of the whole network, norm layers left out of both."""
        return (self.dense_params - self.bn_params) / (self.params - self.bn_params)

    @property
    def macs_ratio(self) -> float:
        """Dense / compressed multiply-accumulates of the whole network for one input."""
        return self.dense_macs / self.macs

    @property
    def ratio(self) -> float:
        """The ratio in the plan's own unit."""
        return self.macs_ratio if self.by == "macs" else self.params_ratio

    @property
    def layers_ratio(self) -> float:
        """Dense / compressed over the decomposed layers alone, in the plan's unit."""
        k = int(self.by == "macs")
        return sum(r.dense[k] for r in self._rows.values()) / max(
            1, sum(r.cost[k] for r in self._rows.values())
        )

    def to_frame(self) -> Any:
        """pandas table: one row per planned layer."""
        import pandas as pd

        rows = [
            (
                name,
                r.format,
                r.ranks,
                *r.dense,
                *r.cost,
                r.dense[0] / r.cost[0],
                r.dense[1] / max(1, r.cost[1]),
            )
            for name, r in self._rows.items()
        ]
        head = "layer format ranks dense_params dense_macs params macs params_ratio macs_ratio".split()
        return pd.DataFrame(rows, columns=head)

    def __str__(self) -> str:
        lines = [
            (
                name,
                r.format,
                "×".join(map(str, r.shape)),
                ",".join(map(str, r.ranks)),
                f"{r.dense[0]:,}",
                f"{r.cost[0]:,}",
                f"{r.dense[0] / r.cost[0]:.2f}",
                f"{r.dense[1] / max(1, r.cost[1]):.2f}",
            )
            for name, r in self._rows.items()
        ]
        head = ("layer", "format", "kernel", "ranks", "params", "→", "ratio", "MACs ratio")
        text = table(head, lines, "lllrrrrr")
        whole = (
            f"whole network: {self.dense_params:,} → {self.params:,} parameters ({self.params_ratio:.3f}×), "
            f"{self.dense_macs:,} → {self.macs:,} MACs ({self.macs_ratio:.3f}×); "
            f"rule {self.rule}, by {self.by}"
        )
        dense = [f"dense: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([text, whole, NOTE, *dense])

    def __repr__(self) -> str:
        return f"Plan({len(self)} layers, format={self.format!r}, ratio={self.ratio:.3f} by {self.by})"

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, for JSON."""
        rows = {
            name: {
                "format": r.format,
                "ranks": list(r.ranks),
                "options": {k: list(v) if isinstance(v, tuple) else v for k, v in r.options.items()},
                "shape": list(r.shape),
                "dense": list(r.dense),
                "cost": list(r.cost),
            }
            for name, r in self._rows.items()
        }
        dense = {"params": self.dense_params, "macs": self.dense_macs, "bn_params": self.bn_params}
        head = {"format": self.format, "rule": self.rule, "by": self.by, "dense": dense}
        return {**head, "layers": rows, "skipped": dict(self.skipped)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote. Raises TdlibError if something is missing."""
        try:
            rows = {
                name: PlanRow(
                    r["format"],
                    tuple(r["ranks"]),
                    {k: tuple(v) if isinstance(v, list) else v for k, v in r["options"].items()},
                    tuple(r["shape"]),
                    (r["dense"][0], r["dense"][1]),
                    (r["cost"][0], r["cost"][1]),
                )
                for name, r in data["layers"].items()
            }
            head = {key: data[key] for key in ("format", "rule", "by", "skipped", "dense")}
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise TdlibError(f"not a plan: {error!r}") from error
        return cls(rows, **head)


def plan(
    model: nn.Module,
    input_shape: Sequence[int],
    format: str = "tt",
    ratio: float | None = None,
    by: str = "params",
    skip: Sequence[str] = (),
    rule: str = "uniform",
    ranks: Mapping[str, Sequence[int]] | None = None,
    statistics: Mapping[str, Tensor] | None = None,
    *,
    energy: float | None = None,
    curves: Callable[[Candidate], Curve] | Mapping[str, Curve] | None = None,
    allow_larger: bool = False,
    multiple: int = 1,
    **options: Any,
) -> Plan:
    """Ranks for every Conv2d and Linear of `model` so that the whole network shrinks by `ratio`, within 2 %.

    input_shape: one input without the batch, e.g. (3, 32, 32). ratio: dense / compressed of the whole
    network, in `by` ("params", norm layers left out of both sides, or "macs"). skip: layer names or globs
    that stay dense.
    rule: "uniform" (same fraction of channels everywhere), "energy" (same kept share of squared singular
    values, or `energy` without a ratio), "evbmf" (with or without a ratio), "global" (budget where it buys
    most; with `statistics` errors are those of the layers' outputs; `curves` replaces the error curves: a
    function of a candidate layer, or layer → [(ranks, cost, error), ...]). ranks: an explicit table instead
    of a rule, layer → ranks; names not in it stay dense. allow_larger: decompose layers that get no smaller
    too. multiple: round every rank to a multiple of it (or to its bound): processors calculate in blocks of
    8 or 16 channels, so that 16 is often faster at the same cost.
    options: for the format, e.g. order=2 or out_modes=(8, 4) for factorised channels; a value may be a
    mapping from layer names or globs to values.
    Raises: BudgetError if the ratio cannot be reached (with the best reachable), RankError, UnknownName,
    NonFiniteError, TdlibError for a model without layers to compress.
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    if multiple < 1:
        raise RankError(f"multiple must be at least 1, got {multiple}")
    cost = count(model, input_shape)
    found, skipped = candidates(
        model, cost, format, by, (skip,) if isinstance(skip, str) else skip, options, allow_larger, multiple
    )
    if not found:
        reasons = (
            "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "it has no Conv2d or Linear"
        )
        raise TdlibError(f"nothing to compress with format {format!r}: {reasons}")
    if ranks is not None and ratio is not None:
        raise TdlibError("give either a ratio or an explicit table of ranks, not both")
    request = Request(None, energy, statistics, curves)
    if ranks is not None:
        rule, choice = "explicit", _explicit(found, skipped, ranks, request)
    else:
        if ratio is not None:
            request.budget = make_budget(cost.by(by), found, ratio, by)
        choice = RULES[rule](found, request)
    rows = {}
    for c in found:
        chosen = choice[c.name]
        if chosen is None:
            reason = request.reasons.get(
                c.name, f"at the chosen ranks the chain is not smaller than dense (in {by})"
            )
            skipped[c.name] = reason
        else:
            rows[c.name] = PlanRow(format, chosen, dict(c.options), c.shape, c.dense, c.both(chosen))
    order = [name for name, _ in model.named_modules()]
    skipped = dict(sorted(skipped.items(), key=lambda item: order.index(item[0])))
    dense = {"params": cost.params, "macs": cost.macs, "bn_params": cost.bn_params}
    return Plan(rows, format=format, rule=rule, by=by, skipped=skipped, dense=dense)


def _explicit(
    found: Sequence[Candidate], skipped: Mapping[str, str], ranks: Mapping[str, Any], request: Request
) -> Choice:
    """An explicit table (names or globs → ranks), checked, copied and cut to the bounds."""
    names = [c.name for c in found]
    table_ = copy.deepcopy(dict(ranks))
    for pattern in table_:
        if not any(fnmatchcase(name, pattern) for name in names):
            if pattern in skipped:
                raise TdlibError(
                    f"layer {pattern!r} has ranks in the table but stays dense: {skipped[pattern]}"
                )
            raise unknown("layer in the rank table", pattern, names)
    choice: Choice = {}
    for c in found:
        given = table_.get(c.name, next((v for p, v in table_.items() if fnmatchcase(c.name, p)), None))
        if given is None:
            request.reasons[c.name] = "not in the rank table"
            choice[c.name] = None
            continue
        try:
            choice[c.name] = c.smaller(c.clip(given))
        except RankError as error:
            raise RankError(f"layer {c.name!r}: {error}") from error
    return choice
