"""What the chapter on distribution-aware decomposition has beside its arms: statistics that rows share,
single layers, other images, its tables, and a data set of one image a class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import tdlib
from tdbook import style
from tdbook.experiment import Arm, Results
from tdbook.tables import summary
from tdlib.data import IMAGENET_MEAN, IMAGENET_STD, ArraySplit, Bundle
from tdlib.decompositions.sigma import cp_sigma, tucker2_sigma
from tdlib.errors import DataError
from tdlib.formats import LayerPlan, get_format
from tdlib.methods import planned
from tdlib.methods.distribution_aware import distribution_aware, layer_errors, measured
from tdlib.planning import Plan, count, end_layers
from tdlib.planning.candidates import candidates
from tdlib.train import agreement, evaluate

Rows = list[dict[str, Any]]

#: The arms in the order of the story.
STEPS = ("frobenius", "sigma", "transfer", "global", "sequential", "bias", "batchnorm")


class Calibrated:
    """`distribution_aware` in one format, with statistics of the dense network that rows share.

    Its methods are the parts of an `Arm`. `start` takes the statistics, once for each network; their seconds
    count in every row. Their images do not: `decompose` draws the same ones again.

    data: what the network was trained on. samples: calibration images. by: "params" or "macs"; of: "network",
    or "layers" for a ratio over the decomposed layers alone. images: batches or a data set whose images take
    the place of the network's own. weigh_outputs: statistics with the Fisher information.
    """

    def __init__(
        self,
        data: Bundle,
        format: str,
        samples: int,
        by: str = "params",
        of: str = "network",
        *,
        images: Any = None,
        weigh_outputs: bool = False,
    ) -> None:
        self.data, self.format, self.samples, self.by, self.of = data, format, samples, by, of
        self.images, self.weigh_outputs = images, weigh_outputs
        self.statistics: dict[nn.Module, Any] = {}  # by dense network

    def start(self, model: nn.Module, data: Bundle, *, seed: int = 0) -> tuple[nn.Module, dict[str, Rows]]:
        """The network itself, its statistics taken."""
        found = measured(
            model, self.data if self.images is None else self.images, format=self.format,
            samples=self.samples, weigh_outputs=self.weigh_outputs, seed=seed,
        )  # fmt: skip
        self.statistics[model] = found.get("statistics")  # without a layer to decompose, planning says so
        return model, {}

    def uniform(self, model: nn.Module, ratio: float, seed: int = 0) -> Plan:
        """The same share of the channels in every layer."""
        return self._plan(model, ratio)

    def by_harm(self, model: nn.Module, ratio: float, seed: int = 0) -> Plan:
        """Ranks where they lower the divergence of the network's output most."""
        if model not in self.statistics:  # where all rows come from records, nothing was started
            self.start(model, self.data, seed=seed)
        return self._plan(model, ratio, rule="global", statistics=self.statistics[model])

    def _plan(self, model: nn.Module, ratio: float, **rule: Any) -> Plan:
        if self.of == "layers":
            layers = sum(decomposable(model, self.data, self.format, self.by).values())
            total = count(model, self.data.input_shape).by(self.by)
            ratio = total / (total - layers + layers / ratio)
        return planned(model, self.data, format=self.format, ratio=ratio, by=self.by, **rule)

    def decompose(
        self,
        model: nn.Module,
        data: Bundle,
        plan: Plan,
        *,
        sequential: bool = False,
        bias_correction: bool = False,
        recalibrate: bool = False,
        seed: int = 0,
    ) -> tuple[nn.Module, dict[str, Rows]]:
        """`distribution_aware` with the statistics that `start` took."""
        return distribution_aware(
            model, data if self.images is None else self.images, plan, statistics=self.statistics[model],
            samples=self.samples, weigh_outputs=self.weigh_outputs, sequential=sequential,
            bias_correction=bias_correction, recalibrate=recalibrate, seed=seed,
        )  # fmt: skip

    def arm(self) -> Arm:
        """The paper's method: uniform ranks, every layer under its statistics."""
        return Arm(self.decompose, self.uniform, start=self.start)


def decomposable(model: nn.Module, data: Bundle, format: str, by: str = "params") -> dict[str, int]:
    """Layers that the format can decompose, the papers' dense end layers left out -> their cost in `by`."""
    cost = count(model, data.input_shape)
    found, _ = candidates(model, cost, format, by, end_layers(model), {})
    return {layer.name: layer.cost(None) for layer in found}


def sampling_errors(
    model: nn.Module, batches: Sequence[Tensor], statistics: Mapping[str, Tensor], seed: int = 0
) -> pd.DataFrame:
    """Relative error of Σ of (at most) three convolutions from random positions of every image."""
    layers = [name for name in statistics if isinstance(model.get_submodule(name), nn.Conv2d)][:3]
    rows = []
    for positions in (1, 2, 4, 8, 16) if layers else ():
        found = tdlib.statistics(model, batches, layers, positions=positions, seed=seed)
        for name in layers:
            error = float((found[name] - statistics[name]).norm() / statistics[name].norm())
            if error > 1e-6:  # else these are all positions that there are
                rows.append({"positions": positions, "layer": name, "error": error})
    return pd.DataFrame(rows)


def descents(weight: Tensor, sigma: Tensor) -> dict[str, list[float]]:
    """Squared relative output errors sweep by sweep at a quarter of the channels, and of the parameters."""
    tucker: list[float] = []
    cp: list[float] = []
    tucker2_sigma(weight, [max(1, c // 4) for c in weight.shape[:2]], sigma, tol=0, trace=tucker)
    rank = max(1, weight.numel() // (4 * sum(weight.flatten(2).shape)))
    cp_sigma(weight, rank, sigma, tol=0, trace=cp)
    return {"Tucker-2": tucker, "CP": cp}


def single_layers(
    model: nn.Module,
    data: Bundle,
    statistics: Mapping[str, Tensor],
    format: str,
    fractions: Sequence[float],
    limit: int = 8,
) -> pd.DataFrame:
    """One layer decomposed at a time, without and with its statistics.

    `limit` layers from the input to the output, each at these fractions of its channels. Columns: method,
    layer, ranks, sigma_error, frobenius_error (relative), test_accuracy, agreement (percent), kl (nats), n.
    """
    names, rows = list(statistics), []
    chosen = dict.fromkeys(names[k] for k in np.linspace(0, len(names) - 1, limit).round().astype(int))
    for name, fraction in product(chosen, fractions):
        layer: Any = model.get_submodule(name)
        ranks = get_format(format).bind(layer.weight.shape).uniform(fraction)
        plan: Any = {name: LayerPlan(format, ranks)}
        for method, given in (("frobenius", None), ("sigma", statistics)):
            small = tdlib.decompose(model, plan, given)
            (errors,) = layer_errors(model, small, plan, statistics)
            accuracy = evaluate(small, data)["accuracy"]
            alike = agreement(model, small, data)
            rows.append({"method": method, **errors, "test_accuracy": accuracy, **alike})
    return pd.DataFrame(rows)


def other_images(batches: Sequence[Tensor], data: Bundle, seed: int = 0) -> dict[str, Iterable[Tensor]]:
    """The calibration images and what may stand in their place, by name; for digits also a photograph."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = data.input_shape
    order = torch.randperm(height * width, generator=generator)
    images: dict[str, Iterable[Tensor]] = {
        "its own training images": batches,
        "50 of its own training images": [batches[0][:50]],
        "mirrored": [x.flip(3) for x in batches],
        "pixels shuffled": [x.flatten(2)[:, :, order].reshape(x.shape) for x in batches],
        "noise": [torch.randn(x.shape, generator=generator).to(x) for x in batches],
    }
    if data.name == "digits":
        from sklearn.datasets import load_sample_images

        photo = torch.tensor(load_sample_images().images[0]).float().mean(2)
        tiles = photo.unfold(0, height, height).unfold(1, width, width).reshape(-1, channels, height, width)
        tiles = ((tiles - tiles.mean()) / tiles.std()).to(batches[0])
        images["patches of a photograph"] = tiles.split(500)
    return images


def with_errors(found: Results, statistics: Mapping[str, Tensor]) -> pd.DataFrame:
    """The rows of an experiment that was run at one seed, not read, with `error`: the mean over the layers of
    the relative error of their outputs under these statistics."""
    (model,) = found.dense.values()
    errors = [
        np.mean([row["sigma_error"] for row in layer_errors(model, small, found.plans[key], statistics)])
        for key, small in found.networks.items()
    ]
    return found.frame.assign(error=errors)


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows by rising ratio and in the order of the story, methods as the text writes them; statistics of
    another data set (column `calibration`) by its name."""
    place = frame["method"].map({step: k for k, step in enumerate(STEPS)})
    ordered = frame.assign(place=place).sort_values(["ratio", "place"], kind="stable").drop(columns="place")
    method = ordered["method"].map(style.label)
    if "calibration" in ordered:
        method = method.where(ordered["calibration"].isna(), "Σ of " + ordered["calibration"].astype(str))
    return ordered.assign(method=method)


def over_ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy, agreement and KL divergence over the ratios, a row per method in the order of the frame."""
    shown = {"test_accuracy": "accuracy (%)", "agreement": "agreement (%)", "kl": "KL"}
    means = summary(frame, ["method", "ratio"], shown)
    table = means.pivot(index="method", columns="ratio", values=list(shown.values())).fillna("–")
    table = table.reindex(frame["method"].unique()).rename(columns="{:g}×".format, level="ratio")
    return table.rename_axis(index=None, columns=[None, None])


def heading(group: pd.DataFrame) -> str:
    """What a group of records of one network has in common, with the 95 % interval of an accuracy."""
    first, images = group.iloc[0], int(group["n"].min())
    dense = group["dense_test_accuracy"].mean()
    chance = 1.96 * (dense * (100 - dense) / images) ** 0.5
    where = ", ".join(first[["dataset", "model", "format"]])
    return (
        f"**{where}, ratio in {first['by']} of the {first['of']}**: dense {dense:.2f} %; {images:,} images "
        f"measured (±{chance:.1f} points by their choice alone), {group['samples'].max():,} calibrate"
    )


def halves(folder: str | Path, limit: int | None = None) -> Bundle:
    """A folder with one sub-folder per class, named so that their order is that of the network's outputs:
    classes with even index for calibration (train), with odd index for evaluation (test). Images as they are,
    ImageNet's constants. limit: at most this many images of either.

    For collections with about one image a class, where a class cannot be divided. Raises: DataError.
    """
    from PIL import Image

    classes = sorted(p for p in Path(folder).expanduser().iterdir() if p.is_dir())
    found: list[tuple[int, np.ndarray]] = []
    for index, place in enumerate(classes):
        for file in sorted(place.iterdir()):
            with Image.open(file) as image:
                found.append((index, np.asarray(image.convert("RGB"))))
    shapes = {a.shape for _, a in found}
    if len(shapes) != 1:
        raise DataError(
            f"{folder}: expected images of one size in class folders, found sizes {sorted(shapes) or 'none'}"
        )
    parts = []
    for odd in (0, 1):
        part = [(i, a) for i, a in found if i % 2 == odd][:limit]
        images, labels = np.stack([a for _, a in part]), torch.tensor([i for i, _ in part])
        parts.append(ArraySplit(torch.from_numpy(images), labels, IMAGENET_MEAN, IMAGENET_STD))
    train, test = parts
    empty = ArraySplit(train.images[:0], train.labels[:0], IMAGENET_MEAN, IMAGENET_STD)
    names = [p.name for p in classes]
    return Bundle("imagenet-sample", names, IMAGENET_MEAN, IMAGENET_STD, train.shape, train, empty, test)
