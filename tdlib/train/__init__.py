"""Training and evaluation: ``fit``, ``evaluate``, ``agreement``; methods attach themselves by a ``Hook``."""

from .evaluation import agreement, evaluate
from .hooks import Context, Hook
from .loop import History, fit
from .schedule import learning_rate

__all__ = ["Context", "History", "Hook", "agreement", "evaluate", "fit", "learning_rate"]
