"""Parts of iterative compression: early stopping, and one layer on its way from dense to its last ranks."""

from __future__ import annotations

import copy
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import recalibrate_batchnorm
from ..errors import NonFiniteError
from ..layers.chains import bias_of
from ..layers.dense import to_dense
from ..layers.recompress import chain_factors, orthogonalise, shrink
from ..layers.scheme import Factors, as_float
from ..planning.candidates import Candidate, Ranks
from ..train import Context
from .direct import KeepBest, accuracies


class EarlyStopping(KeepBest):
    """Ends training when the validation accuracy has not risen for `patience` epochs."""

    def __init__(self, patience: int) -> None:
        super().__init__()
        self.patience, self.stale = patience, 0

    def after_epoch(self, ctx: Context) -> None:
        risen = ctx.row.get("val_accuracy", float("inf")) > self.accuracy
        super().after_epoch(ctx)
        self.stale = 0 if risen else self.stale + 1
        ctx.stop = ctx.stop or self.stale >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "stale": self.stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.stale = int(state["stale"])


class Layer:
    """One layer: the dense geometry it started from, the module it is now, and how to make that smaller."""

    def __init__(self, site: Candidate, dense: nn.Module, orthogonal: bool) -> None:
        self.site, self.orthogonal = site, orthogonal
        self.geometry: Any = copy.deepcopy(dense)
        self.module: nn.Module = dense

    @property
    def dense(self) -> bool:
        """Whether the layer has not been decomposed yet."""
        return not isinstance(self.module, nn.Sequential)

    @property
    def refitted(self) -> bool:
        """Whether a smaller rank is fitted to the whole kernel: the first pass, and CP in every pass."""
        return not isinstance(self.module, nn.Sequential) or (
            self.site.format.name == "cp" and len(self.module) > 2
        )

    def _factors(self) -> Factors:
        factors = [as_float(f) for f in chain_factors(self.module)]  # type: ignore[arg-type]
        return orthogonalise(factors) if self.orthogonal else factors

    def core(self) -> Tensor:
        """What the next pass decomposes; its unfoldings are those that EVBMF sees."""
        return to_dense(self.module).detach() if self.refitted else self._factors()[0]

    def at(self, ranks: Ranks) -> nn.Module:
        """The module of these (smaller) ranks. Raises NonFiniteError."""
        if not all(bool(torch.isfinite(p).all()) for p in self.module.parameters()):
            raise NonFiniteError(
                f"layer {self.site.name!r} has NaN or Inf in its weights: lower the fine-tuning lr"
            )
        if self.refitted:
            factors = self.site.format.factorise(to_dense(self.module).detach(), ranks, **self.site.options)
        else:
            factors = shrink(self._factors(), ranks)
        last: Any = self.module if self.dense else self.module[-1]  # type: ignore[index]
        self.geometry.to(last.weight.device, last.weight.dtype).train(self.module.training)
        self.geometry.bias = bias_of(last)
        return self.site.format.build(self.geometry, factors, **self.site.options)


def recalibrated(model: nn.Module, data: Any, device: Any = None, images: int = 2000) -> dict[str, float]:
    """Accuracies of a copy whose BatchNorm statistics are taken anew from (at most) `images` training images.

    Right after a decomposition the old statistics alone can hold a network at chance; with fresh ones the
    accuracy says what the weights still know. Without BatchNorm the plain accuracies.
    """
    fresh = copy.deepcopy(model)
    if not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in fresh.modules()
    ):
        return accuracies(fresh, data, device)
    size = min(256, len(data.train))
    place = device if device is not None else next(fresh.parameters()).device
    batches = data.batches("train", size, device=place, shuffle=True, drop_last=True)
    recalibrate_batchnorm(fresh.to(place), (x for x, _ in islice(batches, max(1, images // size))))
    return accuracies(fresh, data, device)
