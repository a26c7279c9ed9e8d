"""Replacing layers in a model: what is kept, what is recorded, what is refused."""

import copy

import pytest
import torch
from torch import nn

import tdlib
from tdlib.errors import DataError, NonFiniteError, RankError, TdlibError, UnknownName
from tdlib.layers import FORMATS, RingConv2d, decompose, get_format, skeleton, to_dense


class Net(nn.Module):
    """Two convolutions, one of them used twice under two names, and a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.again = self.body
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = self.again(torch.relu(self.body(x)))
        return self.head(x.mean((2, 3)))


def table(**ranks):
    return {name: {"format": f, "ranks": r, "options": {}} for name, (f, r) in ranks.items()}


def test_input_model_is_untouched_and_the_result_shares_nothing():
    model = Net().eval()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    small = decompose(model, table(stem=("tucker2", (3, 2)), head=("svd", (2,))))
    assert torch.equal(torch.get_rng_state(), rng)
    with torch.no_grad():
        for p in small.parameters():
            p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model, "_tdlib") and type(model.stem) is nn.Conv2d


def test_a_shared_module_is_replaced_everywhere():
    model = Net()
    plan = tdlib.plan(model, (3, 6, 6), ratio=1.5)
    assert "again" not in plan and "body" in plan
    small = decompose(model, plan)
    assert small.again is small.body and type(small.body) is nn.Sequential
    cost = tdlib.count(small, (3, 6, 6))
    assert (cost.params, cost.macs) == (plan.params, plan.macs)


def test_a_single_layer_can_be_the_model():
    layer = nn.Linear(6, 8)
    small = decompose(layer, {"": {"format": "svd", "ranks": [6], "options": {}}})
    x = torch.ones(2, 6)
    torch.testing.assert_close(small(x), layer(x), rtol=1e-4, atol=1e-5)


def test_record_of_what_was_replaced_grows_and_is_copied():
    model = Net()
    model._tdlib = {"spec": {"name": "x", "classes": 4, "kwargs": {}}, "layers": {}}
    once = decompose(model, table(body=("tucker2", (100, 5))))
    twice = decompose(once, {"body.1": {"format": "svd", "ranks": [4], "options": {}}})
    assert model._tdlib["layers"] == {}
    assert once._tdlib["layers"] == {
        "body": {"format": "tucker2", "ranks": [8, 5], "options": {}}
    }  # effective ranks
    assert list(twice._tdlib["layers"]) == ["body", "body.1"] and twice._tdlib["spec"] == model._tdlib["spec"]
    assert copy.deepcopy(twice)._tdlib == twice._tdlib
    assert to_dense(twice.body).shape == (8, 8, 3, 3)
    assert skeleton(model, twice._tdlib["layers"]).state_dict().keys() == twice.state_dict().keys()


def test_a_ring_inside_can_be_decomposed_again():
    model = Net()
    once = decompose(model, {"body": {"format": "tr", "ranks": [2, 3, 3], "options": {}}})
    assert isinstance(once.body, RingConv2d)
    twice = decompose(once, {"body.middle": {"format": "svd", "ranks": [9], "options": {}}})
    torch.testing.assert_close(to_dense(twice.body), to_dense(once.body), rtol=1e-4, atol=1e-5)


def test_statistics_lower_the_output_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 5)).double()
    batches = [
        torch.randn(32, 4, 4, 4, dtype=torch.float64) * torch.tensor([5.0, 1, 0.2, 0.1])[:, None, None]
    ]
    stats = tdlib.statistics(model, batches)
    for format, ranks in (("tucker2", (3, 2)), ("tt", (3, 2)), ("cp", (4,))):
        rows = {"0": {"format": format, "ranks": ranks, "options": {}}}
        plain, aware = decompose(model, rows), decompose(model, rows, statistics=stats)
        target = model[0](batches[0])
        assert (aware[0](batches[0]) - target).norm() < 0.9 * (plain[0](batches[0]) - target).norm()
    with pytest.raises(DataError, match="lack 2"):
        decompose(model, {"2": {"format": "svd", "ranks": [2], "options": {}}}, statistics={"0": stats["0"]})


def test_random_factors_have_kaiming_variance():
    model = nn.ModuleDict({"c": nn.Conv2d(32, 48, 3), "p": nn.Conv2d(32, 48, 1), "l": nn.Linear(48, 36)})
    torch.manual_seed(0)
    for format, row in FORMATS.items():
        if format.startswith("shuffled"):
            continue
        for name, layer in model.items():
            if tdlib.layers.kind_of(layer.weight.shape) not in row.kinds:
                continue
            rows = {name: {"format": format, "ranks": row.at(layer.weight.shape, 0.6), "options": {}}}
            kernel = to_dense(skeleton(model, rows)[name])
            ratio = float(kernel.detach().var()) * layer.weight[0].numel() / 2
            assert 0.5 < ratio < 2, (format, name)


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (table(bodi=("svd", (1,))), UnknownName, "body"),
        (table(norm=("svd", (1,))), UnknownName, "stem"),
        (table(body=("tuker2", (1, 1))), UnknownName, "tucker2"),
        (table(body=("tucker2", (1,))), RankError, "needs 2"),
        (table(body=("tucker2", (0, 1))), RankError, "at least 1"),
        (table(body=("tt-matrix", (1,))), TdlibError, "does not apply"),
        (
            {"head": {"format": "tt", "ranks": [1, 1, 1], "options": {"out_modes": [3, 2]}}},
            RankError,
            "head.*multiply to 6",
        ),
        ({"head": {"format": "tt", "ranks": [1], "options": {"modes": [3, 2]}}}, UnknownName, "out_modes"),
    ],
)
def test_bad_tables_are_refused(rows, error, words):
    with pytest.raises(error, match=words):
        decompose(Net(), rows)


def test_nan_names_the_layer():
    model = Net()
    model.body.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="body"):
        decompose(model, table(body=("svd", (1,))))
    with pytest.raises(NonFiniteError, match="body"):
        tdlib.plan(model, (3, 6, 6), ratio=1.5, rule="global")


def test_a_format_is_one_row():
    """A row that is added works in plan, decompose, count and project; no code asks for formats by name."""
    FORMATS["mine"] = tdlib.layers.Format(
        "mine", "a test", schemes={"linear": get_format("svd").schemes["linear"]}
    )
    try:
        model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
        plan = tdlib.plan(model, (30,), format="mine", ratio=2)
        assert tdlib.count(decompose(model, plan), (30,)).params == plan.params
    finally:
        del FORMATS["mine"]


def test_to_dense_refuses_what_has_no_kernel():
    for module in (
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)),
    ):
        with pytest.raises(TdlibError):
            to_dense(module)
