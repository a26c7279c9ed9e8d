"""Training and evaluation: ``fit``, ``evaluate``, ``agreement``; methods attach themselves by a ``Hook``."""

from tdlib.train.evaluation import agreement, evaluate, inference
from tdlib.train.hooks import Context, Hook
from tdlib.train.loop import fit
from tdlib.train.run import History
from tdlib.train.schedule import learning_rate
from tdlib.train.stages import (
    EarlyStopping,
    KeepBest,
    accuracies,
    fit_selected,
    recalibrated,
    reestimate_batchnorm,
    rehearse,
    require_finished,
    stage,
)

__all__ = [
    "Context",
    "EarlyStopping",
    "History",
    "Hook",
    "KeepBest",
    "accuracies",
    "agreement",
    "evaluate",
    "fit",
    "fit_selected",
    "inference",
    "learning_rate",
    "recalibrated",
    "reestimate_batchnorm",
    "rehearse",
    "require_finished",
    "stage",
]
