"""Choose the ranks of every layer so that the whole network meets a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from tdlib.errors import RankError, TdlibError, needs, unknown
from tdlib.formats import LayerPlan
from tdlib.planning.budget import Choice, make_budget
from tdlib.planning.candidates import Candidate, candidates
from tdlib.planning.cost import Given, measure
from tdlib.planning.probe import probe
from tdlib.planning.rules import RULES, Request
from tdlib.planning.skipped import groups, percent, summary

NOTE = (
    "ratio = dense / compressed of the whole network for one input; norm layers' parameters left out of both"
)


@dataclass(frozen=True)
class LayerCost:
    """What a planned layer costs before and after: kernel shape, and (params, macs), bias left out."""

    shape: tuple[int, ...]
    dense: tuple[int, int]
    planned: tuple[int, int]


@dataclass(frozen=True)
class Plan(Mapping[str, LayerPlan]):
    """Layer name → LayerPlan (format, ranks, options), for the layers to decompose; `skipped` says why the
    others stay dense, and `skipped_costs` what they cost, (params, macs).

    dense_params, dense_macs: of the whole network before (params with norm layers, whose share is
    bn_params); params, macs: after `decompose`, exactly, for layers that the network only calls (one that
    reads a layer's weight composes it anew in every pass, and `count` counts that too). ratio: what the plan
    really gives in its unit `by`; params_ratio and macs_ratio: in either.
    """

    layers: Mapping[str, LayerPlan]
    costs: Mapping[str, LayerCost]
    format: str
    rule: str
    by: str
    dense_params: int
    dense_macs: int
    bn_params: int
    skipped: Mapping[str, str] = field(default_factory=dict)
    skipped_costs: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LayerPlan:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Layer name → ranks."""
        return {name: layer.ranks for name, layer in self.layers.items()}

    @property
    def params(self) -> int:
        """Parameters of the whole network after `decompose`."""
        return self.dense_params + sum(c.planned[0] - c.dense[0] for c in self.costs.values())

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole network after `decompose`, for one input."""
        return self.dense_macs + sum(c.planned[1] - c.dense[1] for c in self.costs.values())

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
        dense = sum(cost.dense[k] for cost in self.costs.values())
        return dense / max(1, sum(cost.planned[k] for cost in self.costs.values()))

    def to_frame(self) -> Any:
        """pandas table: one row per planned layer."""
        rows = [
            {
                "layer": name, "format": layer.format, "ranks": layer.ranks,
                "dense_params": cost.dense[0], "dense_macs": cost.dense[1],
                "params": cost.planned[0], "macs": cost.planned[1],
                "params_ratio": cost.dense[0] / cost.planned[0],
                "macs_ratio": cost.dense[1] / max(1, cost.planned[1]),
            }
            for name, (layer, cost) in self._rows()
        ]  # fmt: skip
        return needs("pandas", "train").DataFrame(rows)

    def _rows(self) -> list[tuple[str, tuple[LayerPlan, LayerCost]]]:
        return [(name, (layer, self.costs[name])) for name, layer in self.layers.items()]

    def __str__(self) -> str:
        rows = [
            (
                name,
                layer.format,
                "×".join(map(str, cost.shape)),
                ",".join(map(str, layer.ranks)),
                f"{cost.dense[0]:,}",
                f"{cost.planned[0]:,}",
                f"{cost.dense[0] / cost.planned[0]:.2f}",
                f"{cost.dense[1] / max(1, cost.planned[1]):.2f}",
            )
            for name, (layer, cost) in self._rows()
        ]
        head = ("layer", "format", "kernel", "ranks", "params", "→", "ratio", "MACs ratio")
        align = ("left",) * 3 + ("right",) * 5
        whole = (
            f"whole network: {self.dense_params:,} → {self.params:,} parameters ({self.params_ratio:.3f}×), "
            f"{self.dense_macs:,} → {self.macs:,} MACs ({self.macs_ratio:.3f}×); "
            f"rule {self.rule}, by {self.by}"
        )
        dense = []
        for group in groups(self.skipped, self.skipped_costs, self.by):
            params = percent(group.size[0], self.dense_params)
            macs = percent(group.size[1], self.dense_macs)
            share = f" ({params} of the parameters, {macs} of the MACs)" if self.skipped_costs else ""
            dense.append(f"dense: {', '.join(group.names)}: {group.reason}{share}")
        return "\n".join([tabulate(rows, head, disable_numparse=True, colalign=align), whole, NOTE, *dense])

    def __repr__(self) -> str:
        return f"Plan({len(self)} layers, format={self.format!r}, ratio={self.ratio:.3f} by {self.by})"

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, for JSON."""
        rows = {
            name: layer.to_dict()
            | {"shape": list(cost.shape), "dense": list(cost.dense), "cost": list(cost.planned)}
            for name, (layer, cost) in self._rows()
        }
        dense = {"params": self.dense_params, "macs": self.dense_macs, "bn_params": self.bn_params}
        head = {"format": self.format, "rule": self.rule, "by": self.by, "dense": dense}
        costs = {name: list(cost) for name, cost in self.skipped_costs.items()}
        return {**head, "layers": rows, "skipped": dict(self.skipped), "skipped_costs": costs}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote. Raises TdlibError if something is missing."""
        try:
            layers = {name: LayerPlan.of(row) for name, row in data["layers"].items()}
            costs = {
                name: LayerCost(tuple(row["shape"]), tuple(row["dense"]), tuple(row["cost"]))
                for name, row in data["layers"].items()
            }
            head = {key: data[key] for key in ("format", "rule", "by", "skipped")}
            dense = data["dense"]
            head["skipped_costs"] = {n: tuple(c) for n, c in data.get("skipped_costs", {}).items()}
            return cls(
                layers, costs, dense_params=dense["params"], dense_macs=dense["macs"],
                bn_params=dense["bn_params"], **head,
            )  # fmt: skip
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise TdlibError(f"not a plan: {error!r}") from error


def plan(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    format: str = "tt",
    ratio: float | None = None,
    by: str = "params",
    skip: Sequence[str] = (),
    rule: str | None = None,
    ranks: Mapping[str, Sequence[int]] | None = None,
    statistics: Mapping[str, Tensor] | None = None,
    *,
    energy: float | None = None,
    multiple: int = 1,
    example_inputs: Given = None,
    progress: bool = False,
    **options: Any,
) -> Plan:
    """Ranks for the layers of `model` so that the whole network shrinks by `ratio`, within 2 %.

    input_shape: one input without the batch, e.g. (3, 32, 32); or example_inputs as `tdlib.count` takes them.
    ratio: dense / compressed of the whole network, in `by` ("params", norm layers left out of both sides, or
    "macs"). skip: layer names or globs that stay dense.
    rule: "uniform" (the default: same fraction of channels everywhere), "energy" (same kept share of squared
    singular values, or `energy` instead of a ratio), "evbmf" (with or without a ratio), "global" (budget
    where it buys most; with `statistics` errors are those of the layers' outputs, with their Fisher weights
    the harm to the network's output). ranks: an explicit table instead of a rule, layer → ranks; names not in
    it stay dense.
    multiple: choose ranks that are multiples of it (or bounds): processors calculate in blocks of 8 or 16
    channels, so that 16 is often faster at the same cost. progress: show bars.
    options: for the format, e.g. order=2 or out_modes=(8, 4) for factorised channels; a value may be a
    mapping from layer names or globs to values.
    Raises: BudgetError if the ratio cannot be reached (with the best reachable, and what stays dense),
    RankError, UnknownName, NonFiniteError, TdlibError for arguments that exclude each other or would be
    ignored, and for a model without layers to compress.
    """
    if rule is not None and rule not in RULES:
        raise unknown("rule", rule, RULES)
    if multiple < 1:
        raise RankError(f"multiple must be at least 1, got {multiple}")
    _check_together(ratio, rule, ranks, statistics, energy, multiple)
    rule = rule or "uniform"
    cost, inputs, output = measure(model, input_shape, example_inputs)
    found, skipped = candidates(
        model, cost, format, by, (skip,) if isinstance(skip, str) else skip, options, multiple
    )
    refused = probe(model, inputs, output, {c.name: c.kernel for c in found})
    found, skipped = [c for c in found if c.name not in refused], skipped | refused
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "it has no kernel"
        raise TdlibError(f"nothing to compress with format {format!r}: {reasons}")
    request = Request(None, energy, statistics, progress)
    if ranks is not None:
        rule, choice = "explicit", _explicit(found, skipped, ranks, request)
    else:
        if ratio is not None:
            total, left = cost.by(by), cost.shares(skipped, [c.name for c in found])
            stays = partial(summary, dict(skipped), left, by, len(found))
            request.budget = make_budget(total, found, ratio, by, stays)
        choice = RULES[rule](found, request)
    layers, costs = {}, {}
    for c in found:
        chosen = choice[c.name]
        if chosen is None:
            reason = request.reasons.get(
                c.name, f"at the chosen ranks the chain is not smaller than dense (in {by})"
            )
            skipped[c.name] = reason
        else:
            layers[c.name] = LayerPlan(format, chosen, c.kernel.options)
            costs[c.name] = LayerCost(c.kernel.shape, c.dense, c.both(chosen))
    order = [name for name, _ in model.named_modules()]
    skipped = dict(sorted(skipped.items(), key=lambda item: order.index(item[0])))
    left = cost.shares(skipped, layers)
    return Plan(layers, costs, format, rule, by, cost.params, cost.macs, cost.bn_params, skipped, left)


def _check_together(
    ratio: float | None, rule: str | None, ranks: Any, statistics: Any, energy: float | None, multiple: int
) -> None:
    """Raises TdlibError for arguments of `plan` of which one would be ignored."""
    if ranks is not None:
        chosen = {"a ratio": ratio, "a rule": rule, "energy": energy, "statistics": statistics}
        idle = [name for name, value in chosen.items() if value is not None]
        idle += ["a multiple"] if multiple != 1 else []
        if idle:
            raise TdlibError(f"give either {', '.join(idle)} or an explicit table of ranks, not both")
        return
    if energy is not None and (rule != "energy" or ratio is not None):
        raise TdlibError(
            "energy is a share to keep, the target of rule='energy' in place of a ratio; "
            f"got energy={energy} with rule={rule!r} and ratio={ratio}"
        )
    if statistics is not None and rule != "global":
        raise TdlibError(
            f"only rule='global' looks at statistics, rule={rule or 'uniform'!r} would ignore them: choose "
            "that rule, or leave them out here and give them to `decompose`"
        )


def _explicit(
    found: Sequence[Candidate], skipped: Mapping[str, str], ranks: Mapping[str, Any], request: Request
) -> Choice:
    """An explicit table (names or globs → ranks), checked and cut to the bounds."""
    names = [c.name for c in found]
    for pattern in ranks:
        if not any(fnmatchcase(name, pattern) for name in names):
            if pattern in skipped:
                raise TdlibError(
                    f"layer {pattern!r} has ranks in the table but stays dense: {skipped[pattern]}"
                )
            raise unknown("layer in the rank table", pattern, names)
    choice: Choice = {}
    for c in found:
        given = ranks.get(c.name, next((v for p, v in ranks.items() if fnmatchcase(c.name, p)), None))
        if given is None:
            request.reasons[c.name] = "not in the rank table"
            choice[c.name] = None
            continue
        try:
            choice[c.name] = c.smaller(c.clip(given))
        except RankError as error:
            raise RankError(f"layer {c.name!r}: {error}") from error
    return choice
