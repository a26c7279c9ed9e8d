"""What the chapter on distribution-aware decomposition has beside its arms: statistics that rows share,
single layers, drift, and a data set of one image a class."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import tdlib
from tdbook.experiment import Arm
from tdbook.other_images import Source
from tdlib.calibration import calibration_batches
from tdlib.data import IMAGENET_MEAN, IMAGENET_STD, ArraySplit, Bundle
from tdlib.decompositions.sigma import cp_sigma, tucker2_sigma
from tdlib.errors import DataError, unknown
from tdlib.formats import LayerPlan, get_format
from tdlib.methods import planned
from tdlib.methods.distribution_aware import distribution_aware, layer_errors, measured
from tdlib.planning import Plan, count, end_layers
from tdlib.planning.candidates import candidates
from tdlib.train import agreement, evaluate, inference

Rows = list[dict[str, Any]]
SAMPLE = "imagenet-sample"


class Calibrated:
    """`distribution_aware` in one format, with statistics of the dense network that rows share.

    Its methods are the parts of an `Arm`. `start` takes the statistics, once for each network; their seconds
    count in every row. Their images do not: `decompose` draws the same ones again.

    data: what the network was trained on. samples: calibration images. by: "params" or "macs"; of: "network",
    or "layers" for a ratio over the decomposed layers alone. layers: see `dense_layers`. images: a data set
    whose images take the place of the network's own, or what makes others of these. weigh_outputs: statistics
    with the Fisher information.
    """

    def __init__(
        self,
        data: Bundle,
        format: str,
        samples: int,
        by: str = "params",
        of: str = "network",
        *,
        layers: str | None = None,
        images: Bundle | Source | None = None,
        weigh_outputs: bool = False,
    ) -> None:
        self.data, self.format, self.samples, self.by, self.of = data, format, samples, by, of
        self.layers, self.images, self.weigh_outputs = layers, images, weigh_outputs
        #: Fingerprint of the other data set: as plain text it is among the settings of the arm's records.
        self.calibration = images.fingerprint if isinstance(images, Bundle) else None
        self.statistics: dict[nn.Module, Any] = {}  # by dense network

    def start(self, model: nn.Module, data: Bundle, *, seed: int = 0) -> tuple[nn.Module, dict[str, Rows]]:
        """The network itself, its statistics taken."""
        found = measured(
            model, self._images(self.data, seed), format=self.format, samples=self.samples,
            skip=dense_layers(model, self.layers), weigh_outputs=self.weigh_outputs, seed=seed,
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
            layers = sum(decomposable(model, self.data, self.format, self.by, self.layers).values())
            total = count(model, self.data.input_shape).by(self.by)
            ratio = total / (total - layers + layers / ratio)
        skip = dense_layers(model, self.layers)
        return planned(model, self.data, format=self.format, ratio=ratio, by=self.by, skip=skip, **rule)

    def _images(self, data: Bundle, seed: int) -> Any:
        if self.images is None or isinstance(self.images, Bundle):
            return self.images or data
        return self.images(calibration_batches(data, self.samples, seed=seed), seed)

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
            model, self._images(data, seed), plan, statistics=self.statistics[model],
            samples=self.samples, weigh_outputs=self.weigh_outputs, sequential=sequential,
            bias_correction=bias_correction, recalibrate=recalibrate, seed=seed,
        )  # fmt: skip

    def arm(self) -> Arm:
        """The paper's method: uniform ranks, every layer under its statistics."""
        return Arm(self.decompose, self.uniform, start=self.start)


def dense_layers(model: nn.Module, layers: str | None = None) -> tuple[str, ...]:
    """Layers that are not decomposed: the first convolution and the classifier, as in the book's other
    chapters; for "published" all but the spatial convolutions, the first one included, as in the code of
    Kalle et al. Raises: UnknownName."""
    if layers is None:
        return end_layers(model)
    if layers != "published":
        raise unknown("choice of layers", layers, ["published"])
    return tuple(
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
    )


def decomposable(
    model: nn.Module, data: Bundle, format: str, by: str = "params", layers: str | None = None
) -> dict[str, int]:
    """Layers that the format can decompose, without `dense_layers` -> their cost in `by`."""
    cost = count(model, data.input_shape)
    found, _ = candidates(model, cost, format, by, dense_layers(model, layers), {})
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


def calibration_sizes(
    model: nn.Module, data: Bundle, plan: Plan, sizes: Sequence[int], seeds: Sequence[int]
) -> pd.DataFrame:
    """The network after the decomposition under Σ of so many images, each draw by itself; of very few, Σ is
    shrunk.

    Columns: images, seed, test_accuracy, agreement (percent), kl (nats), n.
    """
    rows = []
    for size, seed in product(sizes, seeds):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "layer .* it is shrunk")  # on purpose: the figure shows it
            small, _ = distribution_aware(model, data, plan, samples=size, seed=seed)
        accuracy = evaluate(small, data)["accuracy"]
        rows.append(
            {"images": size, "seed": seed, "test_accuracy": accuracy, **agreement(model, small, data)}
        )
    return pd.DataFrame(rows)


def drift(
    model: nn.Module, networks: Mapping[str, nn.Module], layers: Sequence[str], images: Tensor
) -> pd.DataFrame:
    """Relative error of what these layers really put out, on the inputs that reach them in each network.

    Columns: method (the network's name), layer, error.
    """
    wanted = _outputs(model, layers, images)
    rows = []
    for method, small in networks.items():
        for layer, found in _outputs(small, layers, images).items():
            error = float((found - wanted[layer]).norm() / wanted[layer].norm())
            rows.append({"method": method, "layer": layer, "error": error})
    return pd.DataFrame(rows)


def _outputs(model: nn.Module, layers: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keeping(name: str) -> Any:
        return lambda module, given, output: found.update({name: output})

    handles = [model.get_submodule(name).register_forward_hook(keeping(name)) for name in layers]
    with inference(model):
        model(images)
    for handle in handles:
        handle.remove()
    return found


def reduced(data: Bundle) -> dict[str, str]:
    """What records say beside their parameters where the measured images are training images of the network
    (see `halves`): such a run is a reduced one, whatever its profile."""
    if data.name != SAMPLE:
        return {}
    return {"profile": "reduced", "measured_on": f"{len(data.test)} training images"}


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
    return Bundle(SAMPLE, names, IMAGENET_MEAN, IMAGENET_STD, train.shape, train, empty, test)
