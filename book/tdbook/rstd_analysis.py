"""What shuffling does to kernels: projection errors, singular spectra and how steady accuracy is over ratios.

Used by the chapter on RsTD (Li et al., ICASSP 2019, arXiv 1810.13098); see `tdlib.methods.rstd`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tdbook.rstd_training import PlanOf
from tdbook.verdicts import interval, spelt
from tdlib.data import ArraySplit, Bundle
from tdlib.data.augment import NONE
from tdlib.decompositions.linalg import singular_values
from tdlib.errors import BudgetError, DataError
from tdlib.formats import KernelFormat, LayerPlan, to_dense
from tdlib.planning import Plan


def ratio_grid(
    model: nn.Module,
    arms: Mapping[str, PlanOf],
    *,
    low: float = 2.0,
    high: float = 16.0,
    count: int = 3,
) -> list[float]:
    """`count` ratios from `low` to at most `high` in equal factors that every arm reaches.

    Raises: BudgetError where none is above 1.05.
    """
    while high > 1.05:
        first = min(low, 1 + (high - 1) / 4)
        grid = [round(first * (high / first) ** (k / (count - 1)), 2) for k in range(count)]
        try:
            for ratio in grid:
                for planned in arms.values():
                    planned(model, ratio, 0)
            return grid
        except BudgetError:
            high *= 0.8
    raise BudgetError("no ratio above 1.05 can be reached: skip fewer layers")


def ranks(model: nn.Module, arms: Mapping[str, PlanOf], ratios: Sequence[float]) -> pd.DataFrame:
    """The ranks of the largest planned layer, a row per arm, a column per ratio. The random subspace has one
    number in their place, its dimensions.
    """
    found = {}
    for name, planned in arms.items():
        plans = {f"{ratio:g}×": planned(model, ratio, 0) for ratio in ratios}
        found[name] = {
            ratio: max(plan.items(), key=lambda one: plan.costs[one[0]].dense[0])[1].ranks
            for ratio, plan in plans.items()
        }
    return pd.DataFrame(found).T


def projection_errors(
    model: nn.Module, plan: Plan, variants: Mapping[str, Mapping[str, Any]], seed: int = 0
) -> pd.DataFrame:
    """||W - P(W)|| / ||W|| of every planned layer of `model` at about the plan's parameters.

    variants: name -> options that replace the plan's ({"shuffle": False}, ...). Each is given the ranks of
    its uniform family that come nearest to the plan's parameters of that layer. A last variant "noise"
    projects a Gaussian tensor: what any format loses on entries without structure.
    Columns: layer, variant, error, params, ranks.
    """
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for name, planned in plan.items():
        weight = to_dense(model.get_submodule(name)).detach().float().cpu()
        noise = torch.randn(weight.shape, generator=generator)
        params = plan.costs[name].planned[0]
        for variant, changes in {**variants, "noise": {}}.items():
            changed = LayerPlan(planned.format, planned.ranks, {**planned.options, **changes})
            kernel_format = changed.bind(weight.shape)
            ranks = nearest_ranks(kernel_format, params)
            kernel = noise if variant == "noise" else weight
            error = (kernel - kernel_format.project(kernel, ranks)).norm() / kernel.norm()
            rows.append({
                "layer": name, "variant": variant, "error": float(error),
                "params": kernel_format.cost(ranks)[0], "ranks": ranks,
            })  # fmt: skip
    return pd.DataFrame(rows)


def nearest_ranks(kernel_format: KernelFormat, params: float) -> tuple[int, ...]:
    """Ranks of the format's uniform family whose parameters come nearest to `params`."""
    family = {kernel_format.uniform(k / 256) for k in range(257)}
    return min(family, key=lambda ranks: (abs(kernel_format.cost(ranks)[0] - params), ranks))


def shuffle_pixels(data: Bundle, seed: int = 0) -> Bundle:
    """The same images with one fixed permutation of their pixels: neighbours no longer resemble each other.

    Colour channels of a pixel stay together; labels and pixel statistics are as before. Not augmented, since
    crops and flips of shuffled images are not images of the same kind. Raises DataError for images that are
    read from disk.
    """
    _, height, width = data.input_shape
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))

    def split(part: Any) -> ArraySplit:
        if not isinstance(part, ArraySplit):
            raise DataError(
                f"{data.name} is too large to shuffle in memory: load it with limit=... or a smaller "
                "image_size"
            )
        flat = part.images.flatten(1, 2)[:, order]
        return ArraySplit(flat.reshape(part.images.shape), part.labels, part.mean, part.std)

    return dataclasses.replace(
        data, name=f"{data.name} (pixels shuffled)", augment=NONE,
        train=split(data.train), val=split(data.val), test=split(data.test),
    )  # fmt: skip


def neighbour_similarity(data: Bundle, limit: int = 1000) -> float:
    """Mean correlation of horizontally and vertically adjacent pixels over the first training images."""
    images = torch.stack([data.train[i][0] for i in range(min(limit, len(data.train)))])
    pairs = ((images[..., :, 1:], images[..., :, :-1]), (images[..., 1:, :], images[..., :-1, :]))
    values = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in pairs]
    return float(torch.stack(values).nan_to_num().mean())


def kernel_spectra(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Singular values, scaled to norm 1, of every k×k kernel.

    layer -> {"spatial": of the unfolding O·I × K, "channel": of O × I·K}.
    """
    spectra = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1 and math.prod(module.kernel_size) > 1:
            kernel = to_dense(module).detach().float()
            unfoldings = {"spatial": kernel.flatten(2).flatten(0, 1), "channel": kernel.flatten(1)}
            spectra[name] = {kind: _unit(singular_values(m)).cpu() for kind, m in unfoldings.items()}
    return spectra


def effective_rank(values: Tensor) -> float:
    """exp(entropy) of the squared singular values, divided by their number: 1 for a flat spectrum, 1/n for
    rank one.
    """
    share = values.double().square()
    share = share / share.sum()
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return float(entropy.exp() / len(values))


def low_rankness(model: nn.Module) -> pd.DataFrame:
    """Effective ranks of every kernel: a row per layer, columns layer, spatial, channel."""
    return pd.DataFrame([
        {"layer": layer} | {kind: effective_rank(values) for kind, values in spectra.items()}
        for layer, spectra in kernel_spectra(model).items()
    ])  # fmt: skip


def spatial_effective_rank(model: nn.Module) -> dict[str, float]:
    """The mean of the spatial effective ranks over all kernels, as the ledger's claim on similarity asks."""
    return {"spatial_effective_rank": float(low_rankness(model)["spatial"].mean())}


def similarity_in_words(ranked: pd.DataFrame) -> str:
    """The spatial effective ranks after training on images beside those after training on shuffled pixels.

    ranked: of `low_rankness`, with columns network ("images", "pixels shuffled", ...) and seed.
    """
    table = ranked.pivot_table(index=["seed", "layer"], columns="network", values="spatial")
    gap = table["pixels shuffled"] - table["images"]
    per_seed = gap.groupby("seed").mean().to_list()
    return (
        f"Spatial effective rank as a share of the full one, mean over the kernels: "
        f"{table['images'].mean():.3f} after training on images, {table['pixels shuffled'].mean():.3f} on "
        f"shuffled pixels. Shuffled less images, n = {len(per_seed)}: "
        f"{spelt(fmean(per_seed), interval(per_seed), 'of the full rank')}; above zero in "
        f"{int((gap > 0).sum())} of {len(gap)} kernels."
    )


def stability(table: pd.DataFrame) -> pd.DataFrame:
    """How steady accuracy is, one row per method: `range_over_ratios` (max - min over the ratios, mean over
    seeds and its sd), `worst` (least value at any ratio, mean over seeds), `sd_over_seeds` (at equal ratio,
    mean over ratios).

    table: columns method, ratio (the target), seed, test_accuracy.
    """
    rows = []
    for method, group in table.groupby("method", sort=False):
        per_seed = group.groupby("seed")["test_accuracy"].agg(["min", "max"])
        spread = per_seed["max"] - per_seed["min"]
        across = group.groupby("ratio")["test_accuracy"].std(ddof=1)
        rows.append({
            "method": method, "range_over_ratios": spread.mean(), "sd_of_range": spread.std(ddof=1),
            "worst": per_seed["min"].mean(), "sd_over_seeds": across.mean(), "seeds": len(per_seed),
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("method")


def in_words(table: pd.DataFrame, dense: float, guessing: float) -> str:
    """Range and mean of every arm's accuracy, and what lies between the shuffled arm and each other one.

    table: as of `stability`. dense, guessing: accuracies in percent.
    """
    others = [name for name in table["method"].unique() if name != "shuffled"]
    ranges = stability(table)["range_over_ratios"]
    means = table.pivot_table(index="seed", columns="method", values="test_accuracy")
    parts = []
    for name in others:
        gaps = (means["shuffled"] - means[name]).to_list()
        parts.append(f"{name} {spelt(fmean(gaps), interval(gaps), 'points')}")
    return (
        f"Over the ratios {table['ratio'].min():g} to {table['ratio'].max():g} the accuracy ranges over "
        f"**{ranges['shuffled']:.1f} points** in the shuffled arm ("
        + ", ".join(f"{name} {ranges[name]:.1f}" for name in others)
        + f"). On average over the ratios it is {means['shuffled'].mean():.1f} % (dense, trained alike, "
        f"{dense:.1f} %; guessing, {guessing:.1f} %). The shuffled arm less another, n = {len(means)}: "
        + "; ".join(parts)
        + "."
    )


def _unit(values: Tensor) -> Tensor:
    return values / values.norm().clamp_min(torch.finfo(values.dtype).tiny)
