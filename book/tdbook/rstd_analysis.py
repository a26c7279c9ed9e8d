"""What shuffling does to kernels: projection errors, singular spectra and how steady accuracy is over ratios.

Used by the chapter on RsTD (Li et al., ICASSP 2019, arXiv 1810.13098); see `tdlib.methods.rstd`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tdlib.data import ArraySplit, Bundle
from tdlib.data.augment import NONE
from tdlib.errors import DataError
from tdlib.layers.dense import to_dense
from tdlib.layers.formats import get_format, project
from tdlib.planning import Plan
from tdlib.tensor.linalg import singular_values


def projection_errors(
    model: nn.Module, plan: Plan, variants: Mapping[str, Mapping[str, Any]], seed: int = 0
) -> pd.DataFrame:
    """||W - P(W)|| / ||W|| of every planned layer of `model` at about the plan's parameters.

    variants: name -> options that replace the plan's ({"shuffle": False}, ...). Each is given the ranks of
    its uniform family that come nearest to the plan's parameters of that layer. A last variant "noise"
    projects a Gaussian tensor: what any format loses on entries without structure.
    """
    modules, rows = dict(model.named_modules()), []
    generator = torch.Generator().manual_seed(seed)
    for name, planned in plan.rows.items():
        weight = modules[name].weight.detach().float().cpu()
        noise = torch.randn(weight.shape, generator=generator)
        for variant, changes in {**variants, "noise": {}}.items():
            options = {**planned.options, **changes}
            if "modes" in changes:
                options["modes"] = changes["modes"]
            ranks = nearest_ranks(planned.format, weight.shape, planned.cost[0], options)
            kernel = noise if variant == "noise" else weight
            error = (kernel - project(kernel, planned.format, ranks, **options)).norm() / kernel.norm()
            params = get_format(planned.format).cost(weight.shape, ranks, **options)[0]
            rows.append(
                {"layer": name, "variant": variant, "error": float(error), "params": params, "ranks": ranks}
            )
    return pd.DataFrame(rows)


def nearest_ranks(
    format: str, shape: Sequence[int], params: float, options: Mapping[str, Any]
) -> tuple[int, ...]:
    """Ranks of the format's uniform family whose parameters come nearest to `params`."""
    row = get_format(format)
    family = {row.at(shape, k / 256, **options) for k in range(257)}
    return min(family, key=lambda ranks: (abs(row.cost(shape, ranks, **options)[0] - params), ranks))


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


def kernel_spectra(model: nn.Module, skip: Sequence[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """Singular values, scaled to norm 1, of every k×k kernel that is not in `skip`.

    layer -> {"spatial": of the unfolding O·I × K, "channel": of O × I·K}.
    """
    skip = () if skip is None else skip
    spectra = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.groups == 1
            and math.prod(module.kernel_size) > 1
            and name not in skip
        ):
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
    """Effective ranks of every kernel of several networks of one architecture: columns network, layer,
    spatial, channel.
    """
    rows = []
    for network, model in models.items():
        for layer, spectra in kernel_spectra(model).items():
            rows.append(
                {
                    "network": network,
                    "layer": layer,
                    **{kind: effective_rank(s) for kind, s in spectra.items()},
                }
            )
    return pd.DataFrame(rows)


def stability(table: pd.DataFrame, value: str = "accuracy", arm: str = "arm") -> pd.DataFrame:
    """How steady `value` is, one row per arm: `range_over_ratios` (max - min over the ratios, mean over seeds
    and its sd), `worst` (least value at any ratio, mean over seeds), `sd_over_seeds` (at equal ratio, mean
    over ratios).

    table: columns ratio (the target), seed, `arm` and `value`.
    """
    rows = []
    for name, group in table.groupby(arm, sort=False):
        per_seed = group.groupby("seed")[value].agg(["min", "max"])
        spread = per_seed["max"] - per_seed["min"]
        across = group.groupby("ratio")[value].std(ddof=1)
        rows.append({
            arm: name, "range_over_ratios": spread.mean(), "sd_of_range": spread.std(ddof=1),
            "worst": per_seed["min"].mean(), "sd_over_seeds": across.mean(), "seeds": len(per_seed),
        })  # fmt: skip
    return pd.DataFrame(rows).set_index(arm)


def _unit(values: Tensor) -> Tensor:
    return values / values.norm().clamp_min(torch.finfo(values.dtype).tiny)
