"""The compression methods: one file per paper, and the table and front that they share."""

from tdlib.methods.registry import METHODS, Method, available, check, compress, hyperparameters, planned

__all__ = ["METHODS", "Method", "available", "check", "compress", "hyperparameters", "planned"]
