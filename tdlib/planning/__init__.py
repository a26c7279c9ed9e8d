"""Cost, plan and comparison of networks."""

from tdlib.planning.compare import Comparison, compare
from tdlib.planning.cost import Cost, count
from tdlib.planning.plan import Plan, plan

__all__ = ["Comparison", "Cost", "Plan", "compare", "count", "plan"]
