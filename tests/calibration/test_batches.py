"""Calibration inputs from whatever data there is."""

import pytest
import torch

import tdlib
from tdlib.calibration import calibration_batches
from tdlib.errors import DataError


def test_the_first_inputs_of_any_batches_and_none_asked_for_beyond_them():
    asked = []

    def batches():
        for k in range(9):
            asked.append(k)
            yield torch.full((4, 2), float(k)), torch.zeros(4)

    found = calibration_batches(batches(), 10)
    assert [len(x) for x in found] == [4, 4, 2] and asked == [0, 1, 2]
    assert torch.cat(found)[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert len(torch.cat(calibration_batches(batches(), 1000))) == 36


def test_random_training_images_of_a_bundle():
    data = tdlib.data.load("digits", limit=100)
    found = calibration_batches(data, 50, 20)
    assert [len(x) for x in found] == [20, 20, 10]
    assert torch.equal(found[0], calibration_batches(data, 50, 20)[0])
    assert not torch.equal(found[0], calibration_batches(data, 50, 20, seed=1)[0])
    assert len(torch.cat(calibration_batches(data, 10**6))) == len(data.train)


@pytest.mark.parametrize("data", [[], [torch.zeros(0, 3)]])
def test_no_inputs_are_an_error(data):
    with pytest.raises(DataError, match="no calibration inputs"):
        calibration_batches(data)
