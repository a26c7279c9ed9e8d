"""The compression methods: one file per paper, and the table and front that they share."""

from tdlib.methods.registry import METHODS, Method, available, compress, hyperparameters, planned, reachable

__all__ = ["METHODS", "Method", "available", "compress", "hyperparameters", "planned", "reachable"]
