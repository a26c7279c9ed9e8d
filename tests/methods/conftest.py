"""What the tests share: the digits, and one network trained on them, which no method may change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import tdlib
from tdlib.data import Bundle


@pytest.fixture(scope="session")
def digits() -> Bundle:
    return tdlib.data.load("digits")


@pytest.fixture(scope="session")
def trained(digits: Bundle) -> Iterator[nn.Module]:
    torch.manual_seed(0)
    model = tdlib.models.build("cnn", digits.classes, input_shape=digits.input_shape, width=16)
    tdlib.train.fit(model, digits, epochs=8, lr=0.05, batch_size=32, device="cpu", progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield model
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
