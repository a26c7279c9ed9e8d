"""What the primer counts and says of one kernel and one network."""

import pandas as pd
import pytest
import torch

from tdbook.figures import primer
from tdlib.formats import get_format


def test_directions_are_counted_in_both_channel_unfoldings():
    flat, steep = torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)
    for i in range(3):
        flat[i, i, 0, 0], steep[i, i, 0, 0] = 1.0, 10.0**-i
    table = primer.directions({"flat": flat, "steep": steep})
    assert table.loc["output"].tolist() == ["3 of 4", "1 of 4"]
    assert table.loc["input"].tolist() == ["3 of 3", "1 of 3"]


def test_three_tt_cores_are_a_tucker2_of_equal_ranks_and_size():
    torch.manual_seed(0)
    weight = torch.randn(8, 6, 3, 3)
    tt, tucker2 = (get_format(name).bind(weight.shape) for name in ("tt", "tucker2"))
    cores = tt.decompose(weight, (4, 3))
    factors = primer.as_tucker2(cores, weight.shape)
    torch.testing.assert_close(tucker2.compose(factors), tt.compose(cores))
    assert tucker2.cost((4, 3)) == tt.cost((4, 3))
    assert sum(f.numel() for f in factors) == tucker2.cost((4, 3))[0]


@pytest.mark.parametrize(("fresh", "said"), [(90.0, "alone make +30.0"), (50.0, "alone make -10.0")])
def test_the_share_of_batchnorm_has_its_sign(fresh, said):
    rows = [{"asked": 2.0, "test_accuracy": 60.0 + d, "recalibrated": fresh + d} for d in (-1, 1)]
    text = primer.batchnorm_share(pd.DataFrame(rows), 95.0)
    assert text.startswith("- 2×, mean of 2 formats") and "as decomposed -35.0" in text and said in text
