"""The distribution-aware chapter's experiments: every variant at every ratio on one network, and what they
share.

Variants, each adding one thing to the one before (all without training and without labels): frobenius (plain
decomposition, uniform ranks), sigma (the paper: the same ranks, error of the output), global (ranks by harm,
outputs weighted), sequential (layers fitted one after the other), then, reported apart because they change
more than the kernels: bias (bias correction) and batchnorm (recalibration). `transfer:NAME` is sigma with
the second moments of other images.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdlib.calibration import TEMPERATURE, Statistics, recalibrate_batchnorm, statistics
from tdlib.data import Bundle
from tdlib.errors import unknown
from tdlib.harm import HarmCurves
from tdlib.layers.formats import get_format
from tdlib.layers.replace import decompose
from tdlib.layers.weighted import factorise_weighted
from tdlib.methods.direct import end_layers
from tdlib.methods.distribution_aware import at_once, calibration_batches, in_sequence, layer_errors, limited
from tdlib.planning import Plan, count, plan
from tdlib.planning.candidates import candidates
from tdlib.sensitivity import damped, divergence, fisher, logits
from tdlib.tensor.sigma_norm import sigma_error

VARIANTS = ("frobenius", "sigma", "global", "sequential", "bias", "batchnorm")
TRANSFER = "transfer:"


class Study:
    """One dense network on one data set; statistics, weights and curves are made once and shared.

    model: trained. data: a Bundle. skip: layers that stay dense (default the first convolution and the
    classifier). samples: calibration images (training split). points: ranks per layer at which harm is
    measured. limit: only the first so many images of the split that results are measured on; first: report
    accuracy on those apart, too. others: name -> batches of other images, normalised like the network's own,
    for the variants `transfer:NAME`.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Bundle,
        *,
        samples: int = 1000,
        batch_size: int = 100,
        seed: int = 0,
        device: str | torch.device = "cpu",
        skip: Sequence[str] | None = None,
        points: int = 0,
        measure_samples: int = 300,
        split: str = "test",
        limit: int | None = None,
        first: int | None = None,
        others: Mapping[str, Iterable[Any]] | None = None,
    ) -> None:
        self.first, self.others = first, dict(others or {})
        self.model, self.data, self.points = model.to(device).eval(), data, points
        self.device, self.batch_size, self.measure_samples = device, batch_size, measure_samples
        self.skip = end_layers(model) if skip is None else tuple(skip)
        self.batches = calibration_batches(data, samples, batch_size, seed, device)
        self.split, self.limit = split, limit
        self.labels = torch.cat([y for _, y in self.held_out()]).cpu()
        self.reference = logits(self.model, self.held_out())
        self.cost = count(model, data.input_shape)
        self._statistics: Statistics | None = None
        self._weights: dict[str, Tensor] | None = None
        self._curves: dict[tuple[str, str], HarmCurves] = {}
        self.seconds: dict[str, float] = {}
        self._last: tuple[Any, nn.Module] | None = None

    def held_out(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of the images that results are measured on."""
        left = len(self.data.split(self.split)) if self.limit is None else self.limit
        for x, y in self.data.batches(self.split, self.batch_size, device=self.device, shuffle=False):
            yield x[:left], y[:left]
            left -= len(x)
            if left <= 0:
                return

    def names(self, format: str) -> list[str]:
        """Layers that the format can decompose."""
        return [c.name for c in candidates(self.model, self.cost, format, "params", self.skip, {})[0]]

    def statistics(self) -> Statistics:
        """Sigma of every layer of the dense network but the skipped ones."""
        if self._statistics is None:
            start = time.perf_counter()
            self._statistics = statistics(self.model, self.batches, self.names("tucker2"))
            self.seconds["statistics"] = time.perf_counter() - start
        return self._statistics

    def weights(self) -> dict[str, Tensor]:
        """Damped Fisher information at the layers' outputs."""
        if self._weights is None:
            found = fisher(self.model, self.batches, self.names("tucker2"), temperature=TEMPERATURE)
            self._weights = {n: damped(h) for n, h in found.items()}
        return self._weights

    def curves(self, format: str, by: str) -> HarmCurves:
        """Harm against cost of every layer."""
        if (format, by) not in self._curves:
            probe = list(limited(self.batches, self.measure_samples))
            self._curves[format, by] = HarmCurves(
                self.model, self.statistics(), self.weights(), probe, self.points
            )
        return self._curves[format, by]

    def plan(self, variant: str, format: str, ratio: float, by: str) -> Plan:
        """Ranks: uniform for frobenius and sigma, by harm for the others."""
        uniform = variant in ("frobenius", "sigma") or variant.startswith(TRANSFER)
        rule = "uniform" if uniform else "global"
        curves = self.curves(format, by) if rule == "global" else None
        return plan(self.model, self.data.input_shape, format, ratio, by, self.skip, rule, curves=curves)

    def compressed(self, variant: str, table: Plan) -> nn.Module:
        """The network that the variant makes with these ranks."""
        valid = [*VARIANTS, *(TRANSFER + name for name in self.others)]
        if variant not in valid:
            raise unknown("variant", variant, valid)
        if variant.startswith(TRANSFER):
            images = self.others[variant.removeprefix(TRANSFER)]
            return at_once(self.model, table, statistics(self.model, images, list(table)))
        if variant == "frobenius":
            return decompose(self.model, table)
        if variant == "sigma":
            return at_once(self.model, table, self.statistics())
        if variant == "global":
            return at_once(self.model, table, self.statistics(), self.weights())
        if variant == "bias":
            return in_sequence(self.model, table, self.batches, self.weights(), bias_correction=True)
        key = table.to_dict()  # batchnorm starts from what sequential made
        if self._last is None or self._last[0] != key:
            self._last = key, in_sequence(self.model, table, self.batches, self.weights())
        small = copy.deepcopy(self._last[1])
        return recalibrate_batchnorm(small, self.batches) if variant == "batchnorm" else small

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Accuracy and agreement with the dense network (percent), KL divergence (nats), number of images."""
        found = logits(model, self.held_out())
        same, right = found.argmax(1) == self.reference.argmax(1), found.argmax(1) == self.labels
        measured = {
            "test_accuracy": 100 * float(right.double().mean()),
            "agreement": 100 * float(same.double().mean()),
            "kl": divergence(self.reference, found),
            "n": len(found),
        }
        if self.first is not None:
            measured[f"accuracy_first_{self.first}"] = 100 * float(right[: self.first].double().mean())
        return measured

    def dense_accuracy(self) -> float:
        """Accuracy of the dense network on the same images."""
        return 100 * float((self.reference.argmax(1) == self.labels).double().mean())

    def whole(self, ratio: float, format: str, by: str) -> float:
        """The whole network's ratio when the decomposed layers together shrink by `ratio`."""
        layers, total = self.sizes(format, by)
        return total / (total - layers + layers / ratio)

    def sizes(self, format: str, by: str) -> tuple[int, int]:
        """(cost of the layers that the format can decompose, of the whole network without norm layers)."""
        found = candidates(self.model, self.cost, format, by, self.skip, {})[0]
        return sum(c.cost(None) for c in found), self.cost.macs if by == "macs" else self.cost.weights

    def run(
        self, variant: str, format: str, ratio: float, by: str = "params", of: str = "network"
    ) -> dict[str, Any]:
        """One row: variant, ranks, achieved ratios, what was measured, seconds. of: "network", or "layers"
        for a ratio over the decomposed layers alone."""
        start = time.perf_counter()
        table = self.plan(variant, format, ratio if of == "network" else self.whole(ratio, format, by), by)
        small = self.compressed(variant, table)
        seconds = time.perf_counter() - start
        layers, total = self.sizes(format, by)
        return {
            "method": variant,
            "format": format,
            "ratio": ratio,
            "by": by,
            "of": of,
            **self.measure(small),
            "dense_test_accuracy": self.dense_accuracy(),
            "params_ratio": table.params_ratio,
            "macs_ratio": table.macs_ratio,
            "layers_ratio": layers / (layers - total + total / table.ratio),
            "seconds": seconds,
            "ranks": {n: list(table[n]) for n in table},
        }

    def layer_drops(self, format: str, fractions: Sequence[float], limit: int = 8) -> list[dict[str, Any]]:
        """One layer compressed at a time, both ways: relative errors in both norms, accuracy and KL."""
        rows, row, stats = [], get_format(format), self.statistics()
        chosen = self.names(format)
        chosen = [
            chosen[round(k * (len(chosen) - 1) / max(1, min(limit, len(chosen)) - 1))]
            for k in range(min(limit, len(chosen)))
        ]
        for name in chosen:
            W = self.model.get_parameter(f"{name}.weight").detach()
            for fraction in fractions:
                ranks = row.at(tuple(W.shape), fraction)
                for method in ("frobenius", "sigma"):
                    factors = (
                        row.factorise(W, ranks)
                        if method == "frobenius"
                        else factorise_weighted(row, W, ranks, stats[name])
                    )
                    What = row.compose(factors, tuple(W.shape)).reshape(W.shape)
                    trial = copy.deepcopy(self.model)
                    with torch.no_grad():
                        trial.get_parameter(f"{name}.weight").copy_(What)
                    rows.append(
                        {
                            "layer": name,
                            "ranks": list(ranks),
                            "method": method,
                            "sigma_error": sigma_error(W, What, stats[name]),
                            "frobenius_error": float((W - What).norm() / W.norm()),
                            **self.measure(trial),
                        }
                    )
        return rows

    def spectra(self) -> dict[str, Tensor]:
        """Layer -> eigenvalues of Sigma, largest first, as shares of their sum."""
        found = {n: torch.linalg.eigvalsh(s).flip(0).clamp_min(0) for n, s in self.statistics().items()}
        return {n: v / v.sum() for n, v in found.items()}

    def transfer(
        self, others: Mapping[str, Iterable[Any]], format: str, ratio: float, by: str = "params"
    ) -> list[dict[str, Any]]:
        """The paper's decomposition with Sigma of other data, at the ranks and on the test images of this
        one.
        """
        table, rows = self.plan("sigma", format, ratio, by), []
        for name, batches in others.items():
            stats = statistics(self.model, batches, list(table))
            small = at_once(self.model, table, stats)
            own = layer_errors(self.model, small, table, self.statistics())
            error = float(np.mean([r["sigma_error"] for r in own]))
            rows.append({"Sigma from": name, **self.measure(small), "mean Sigma error": error})
        return rows
