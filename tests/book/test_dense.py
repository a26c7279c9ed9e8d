"""The dense networks that chapters start from."""

from functools import partial

import torch

import tdlib
from tdbook.dense import trained, trained_on
from tdlib.network import fingerprint
from tdlib.train import stage


def test_a_network_is_trained_once_per_seed_and_goes_on_as_a_copy():
    data = tdlib.data.load("digits", limit=100)
    options = partial(stage, {"device": "cpu", "progress": False, "lr": 0.01, "batch_size": 32}, started=0)
    dense = trained("cnn", data, 1, options, width=8)
    assert dense(0) is dense(0) and fingerprint(dense(0)) != fingerprint(dense(1))
    torch.manual_seed(0)
    fresh = tdlib.models.build("cnn", data.classes, input_shape=data.input_shape, width=8)
    assert fingerprint(trained("cnn", data, 0, options, width=8)(0)) == fingerprint(fresh)
    before = fingerprint(dense(0))
    longer = trained_on(data, 1, options, {"epochs": 1, "lr": 0.001})(dense(0), 0)
    assert fingerprint(longer) != before == fingerprint(dense(0))
