"""Cost, plan and comparison of networks."""

from tdlib.planning.cost import Cost, count
from tdlib.planning.plan import Plan, plan

__all__ = ["Cost", "Plan", "count", "plan"]
