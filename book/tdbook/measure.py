"""What a method costs and keeps, measured: the rows of the chapter "Which method when"."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from tdlib.data import Bundle
from tdlib.methods import METHODS, compress
from tdlib.methods.direct import accuracies, fit_selected
from tdlib.planning import count
from tdlib.train import agreement


class _Counting:
    """Batches that add the number of inputs they give out to ``drawn[split]``."""

    def __init__(self, batches: Any, drawn: dict[str, int], split: str) -> None:
        self._batches, self._drawn, self._split = batches, drawn, split

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self._batches:
            self._drawn[self._split] = self._drawn.get(self._split, 0) + len(x)
            yield x, y


@dataclass(frozen=True)
class CountedBundle(Bundle):
    """A data set that counts the inputs drawn from each of its splits, in ``drawn``."""

    drawn: dict[str, int] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, data: Bundle) -> CountedBundle:
        """The same data, counted from now on."""
        return cls(**{row.name: getattr(data, row.name) for row in fields(Bundle)})

    def batches(self, split: str, batch_size: int, **options: Any) -> Any:
        """As ``Bundle.batches``."""
        return _Counting(super().batches(split, batch_size, **options), self.drawn, split)


def describe(model: nn.Module, data: Bundle, device: str | None = None) -> dict[str, float]:
    """Parameters without BatchNorm, MACs, accuracy in percent on the test (and validation) split."""
    cost, found = count(model, data.input_shape), accuracies(model, data, device)
    return {"params": cost.weights, "macs": cost.macs, "accuracy": found["test"]} | (
        {"val_accuracy": found["val"]} if "val" in found else {}
    )


def measure(
    dense: nn.Module,
    method: str,
    data: Bundle,
    *,
    ratio: float,
    by: str = "params",
    seed: int = 0,
    hyper: Mapping[str, Any] | None = None,
    finetune: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """``tdlib.compress``, with a row of what it took and what is left.

    hyper: the method's arguments. finetune: arguments of ``train.fit``, for a method that does not train;
    the epoch that was best on the validation split is kept.

    seconds: wall time of all of it, the method's own measurements included. images: inputs drawn from the
    training split. labels: whether it trained with their labels; epochs: for how many passes.
    kept: test accuracy minus the dense network's, in points. Ratios leave BatchNorm out.
    """
    counted = CountedBundle.of(data)
    started = time.perf_counter()
    hyper = dict(hyper or {})
    small = compress(dense, method, counted, ratio=ratio, by=by, seed=seed, **hyper)
    if finetune:
        fit_selected(small, counted, **{"seed": seed, **finetune})
    seconds = time.perf_counter() - started
    device = hyper.get("device")
    before, after = describe(dense, data, device=device), describe(small, data, device=device)
    images = counted.drawn.get("train", 0)
    labels = METHODS[method].labels or bool(hyper.get("finetune_epochs")) or bool(finetune)
    return small, {
        "method": method,
        "ratio": ratio,
        **after,
        "params_ratio": before["params"] / after["params"],
        "macs_ratio": before["macs"] / after["macs"],
        "kept": after["accuracy"] - before["accuracy"],
        "agreement": agreement(dense, small, data, "test", device=device)["agreement"],
        "seconds": seconds,
        "images": images,
        "epochs": images / len(data.train) if labels else 0.0,
        "labels": labels,
    }
