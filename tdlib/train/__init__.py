"""Training and evaluation: ``fit``, ``evaluate``, ``agreement``; methods attach themselves by a ``Hook``.
``tune_cpu`` finds the fastest way to train on a CPU.
"""

from .evaluation import agreement, evaluate
from .hooks import Context, Hook
from .loop import History, fit
from .schedule import learning_rate
from .tuning import Setting, Tuning, tune_cpu

__all__ = [
    "Context",
    "History",
    "Hook",
    "Setting",
    "Tuning",
    "agreement",
    "evaluate",
    "fit",
    "learning_rate",
    "tune_cpu",
]
