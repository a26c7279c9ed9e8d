"""The counter against hand counts and published numbers; it leaves the model alone."""

import pytest
import torch
from torch import nn

import tdlib
from tdlib.errors import TdlibError

# Option-A shortcuts, 32x32 inputs: all parameters, BatchNorm's, MACs of convolutions and the linear layer.
RESNETS = [
    ("resnet20", 10, 269_722, 1_376, 40_551_040),
    ("resnet20", 100, 275_572, 1_376, 40_556_800),
    ("resnet32", 10, 464_154, 2_272, 68_862_592),
    ("resnet32", 100, 470_004, 2_272, 68_868_352),
    ("resnet44", 10, 658_586, 3_168, 97_174_144),
    ("resnet56", 10, 853_018, 4_064, 125_485_696),
    ("resnet110", 10, 1_727_962, 8_096, 252_887_680),
]


@pytest.mark.parametrize(("name", "classes", "params", "norms", "macs"), RESNETS)
def test_published_networks(name, classes, params, norms, macs):
    cost = tdlib.count(tdlib.models.build(name, classes), (3, 32, 32))
    assert (cost.params, cost.bn_params, cost.macs) == (params, norms, macs)
    assert cost.weights == cost.by("params") == params - norms and cost.by("macs") == macs
    assert sum(row.params for row in cost.layers) == params and sum(row.macs for row in cost.layers) == macs


def test_resnet18():
    cost = tdlib.count(tdlib.models.build("resnet18", 1000), (3, 224, 224))
    assert cost.params == 11_689_512 and cost.macs == 1_814_073_344


def test_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2)),  # 8 x 5 x 12
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=4, bias=False),  # 8 x 3 x 10
        nn.ConvTranspose2d(8, 4, 2, stride=2),  # 4 x 6 x 20
        nn.Flatten(),
        nn.LayerNorm(480),
        nn.Linear(480, 7),
    )
    cost = tdlib.count(model, (3, 10, 12))
    rows = {row.name: row for row in cost.layers}
    assert rows["0"].params == 8 * 3 * 15 + 8 and rows["0"].macs == 8 * 3 * 15 * 5 * 12
    assert rows["2"].params == 8 * 2 * 9 and rows["2"].macs == 8 * 2 * 9 * 3 * 10
    assert rows["3"].macs == 8 * 4 * 4 * 3 * 10
    assert rows["6"].macs == 480 * 7 and rows["0"].out_shape == (1, 8, 5, 12)
    assert cost.bn_params == 16 + 960
    text = str(cost)
    assert "norm layers" in text and f"{cost.macs:,}" in text
    assert list(cost.to_frame().name) == list(rows)


class NormedLinear(nn.Linear):
    """A matrix, whatever the name of its class says."""


def test_a_matrix_is_no_norm():
    model = nn.Sequential(nn.Linear(8, 8), NormedLinear(8, 8), nn.LayerNorm(8))
    cost = tdlib.count(model, (8,))
    assert cost.bn_params == 16 and cost.weights == 2 * 72


class Reused(nn.Module):
    """One linear layer called at every time step, under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"cell": nn.Linear(4, 4)})
        self.b = nn.ModuleDict({"cell": self.a["cell"]})

    def forward(self, x):
        for step in x.unbind(1):
            x = self.b["cell"](self.a["cell"](step))
        return x


def test_repeated_calls_are_counted_every_time():
    cost = tdlib.count(Reused(), (5, 4))
    assert cost.params == 20 and cost.macs == 10 * 16
    (row,) = cost.layers
    assert row.name == "a.cell" and len(row.calls) == 10


class Fused(nn.Module):
    """Layers that torch computes by fused kernels."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.attention(self.lstm(x)[0])


def test_fused_recurrent_and_attention_layers_are_not_missed():
    cost = tdlib.count(Fused(), (5, 6))
    recurrent = 5 * 4 * 8 * (6 + 8)
    attention = (
        5 * 8 * 24 + 5 * 8 * 8 + 2 * 5 * 5 * 8
    )  # projections, output, and the two products with the tokens
    assert cost.macs == recurrent + attention + 2 * 5 * 8 * 16


def test_model_is_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    tdlib.count(model, (1, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_input_that_does_not_fit_is_a_named_error():
    model = nn.Sequential(nn.Linear(4, 2)).train()
    with pytest.raises(TdlibError, match="does not run"):
        tdlib.count(model, (5,))
    assert model.training


@pytest.mark.parametrize("shape", [(3, -1, 8), (0, 8, 8)])
def test_shapes_that_are_none_are_refused(shape):
    with pytest.raises(TdlibError, match="at least 1"):
        tdlib.count(torch.nn.Conv2d(3, 4, 3), shape)
