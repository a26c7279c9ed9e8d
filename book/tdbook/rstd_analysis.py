"""What shuffling does to kernels: projection errors, singular spectra and how steady accuracy is over ratios.

Used by the chapter on RsTD (Li et al., ICASSP 2019, arXiv 1810.13098); see `tdlib.methods.rstd`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tdlib.data import ArraySplit, Bundle
from tdlib.data.augment import NONE
from tdlib.decompositions.linalg import singular_values
from tdlib.errors import BudgetError, DataError
from tdlib.formats import KernelFormat, LayerPlan, to_dense
from tdlib.methods.rstd import shuffled_plan
from tdlib.planning import Plan

Variants = Mapping[str, Mapping[str, Any]]


def ratio_grid(
    model: nn.Module,
    data: Any,
    format: str,
    variants: Variants,
    *,
    low: float = 2.0,
    high: float = 16.0,
    count: int = 5,
) -> list[float]:
    """`count` ratios from `low` to at most `high` in equal factors that every variant reaches.

    variants: name -> options of `shuffled_plan`. Raises: BudgetError where none is above 1.05.
    """
    while high > 1.05:
        first = min(low, 1 + (high - 1) / 4)
        grid = [round(first * (high / first) ** (k / (count - 1)), 2) for k in range(count)]
        try:
            for ratio in grid:
                for options in variants.values():
                    shuffled_plan(model, data, ratio=ratio, format=format, **options)
            return grid
        except BudgetError:
            high *= 0.8
    raise BudgetError(f"no ratio above 1.05 can be reached with format {format!r}: skip fewer layers")


def by_arm(saved: pd.DataFrame) -> pd.DataFrame:
    """Records with the arm as `method`. Older ones call the arms shuffled and kernel both "rstd" and tell
    them apart by the column `shuffled`.
    """
    if "shuffled" not in saved:
        return saved
    arm = saved["shuffled"].map({True: "shuffled", False: "kernel"})
    return saved.assign(method=saved["method"].where(saved["method"] != "rstd", arm))


def projection_errors(model: nn.Module, plan: Plan, variants: Variants, seed: int = 0) -> pd.DataFrame:
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


def low_rankness(models: Mapping[str, nn.Module]) -> pd.DataFrame:
    """Effective ranks of every kernel of several networks of one architecture: a row per layer, columns
    (spatial or channel, network).
    """
    rows = []
    for network, model in models.items():
        for layer, spectra in kernel_spectra(model).items():
            ranks = {kind: effective_rank(values) for kind, values in spectra.items()}
            rows.append({"network": network, "layer": layer, **ranks})
    table = pd.DataFrame(rows)
    ranked = table.pivot(index="layer", columns="network", values=["spatial", "channel"])
    return ranked.loc[table["layer"].unique()]


def lower_on_images(ranked: pd.DataFrame) -> str:
    """In words: which kernels of the network "images" have a lower spatial rank than those of "pixels
    shuffled". ranked: of `low_rankness`.
    """
    gap = ranked["spatial"]["pixels shuffled"] - ranked["spatial"]["images"]
    firsts = ", ".join(f"{name} {value:+.3f}" for name, value in gap.iloc[:3].items())
    return (
        f"In {int((gap > 0).sum())} of {len(gap)} kernels the spatial effective rank is lower after training "
        f"on images than after training on shuffled pixels (first layers: {firsts})."
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


def dense_level(table: pd.DataFrame) -> float:
    """The dense networks' test accuracy, mean over seeds."""
    return float(table.groupby("seed")["dense_test_accuracy"].first().mean())


def in_words(table: pd.DataFrame, guessing: float) -> str:
    """Range and mean of the shuffled arm's accuracy beside the other two; guessing: percent."""
    ranges = stability(table)["range_over_ratios"]
    means = table.groupby("method")["test_accuracy"].mean()
    return (
        f"Over the ratios {table['ratio'].min():g} to {table['ratio'].max():g} the accuracy of the shuffled "
        f"arm ranges over **{ranges['shuffled']:.1f} points** (not shuffled: folded {ranges['folded']:.1f}, "
        f"kernel {ranges['kernel']:.1f}). On average over all ratios it is {means['shuffled']:.1f} % (dense, "
        f"trained alike, {dense_level(table):.1f} %; guessing, {guessing:.1f} %): "
        f"{means['shuffled'] - means['kernel']:+.1f} points from the conventional decomposition (kernel) and "
        f"{means['shuffled'] - means['folded']:+.1f} from the same folding without shuffling."
    )


def _unit(values: Tensor) -> Tensor:
    return values / values.norm().clamp_min(torch.finfo(values.dtype).tiny)
