"""Cost, plan and comparison of networks."""

from tdlib.planning.candidates import end_layers
from tdlib.planning.compare import Comparison, compare
from tdlib.planning.cost import Cost, count
from tdlib.planning.plan import Plan, plan

__all__ = ["Comparison", "Cost", "Plan", "compare", "count", "end_layers", "plan"]
