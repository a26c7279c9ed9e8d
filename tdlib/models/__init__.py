"""Networks by name: ``build(name, classes)``, ``available()`` and the package's own trained
``pretrained(name)``.
"""

from tdlib.models.building import available, build, inputs_of, pretrained, shipped, structural
from tdlib.models.cifar_resnet import CifarResNet
from tdlib.models.small import LSTMClassifier, SmallCNN
from tdlib.models.weights import load_weights, misfit

__all__ = [
    "CifarResNet",
    "LSTMClassifier",
    "SmallCNN",
    "available",
    "build",
    "inputs_of",
    "load_weights",
    "misfit",
    "pretrained",
    "shipped",
    "structural",
]
