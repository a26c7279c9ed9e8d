"""Plans: budgets met, predictions exact, and reasons for what stays dense."""

import json
import math

import pytest
import torch
from torch import nn

import tdlib
from tdlib.errors import BudgetError, RankError, TdlibError, UnknownName
from tdlib.formats import LayerPlan, skeleton
from tdlib.planning.rules import RULES, global_ranks

SHAPE = (3, 16, 16)


class Tokens(nn.Module):
    """A map (N, C, H, W) as a sequence of positions (N, H W, C)."""

    def forward(self, x):
        return x.flatten(2).mT


def network(seed=0):
    """Strides, a 1x1, a linear layer over positions, norms; kernels of low rank plus noise."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=(2, 1), padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(12, 16, (3, 5), padding="same", dilation=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1, stride=2),
        Tokens(),
        nn.Linear(16, 20),
        nn.Flatten(),
        nn.LayerNorm(640),
        nn.Linear(640, 10),
    )
    with torch.no_grad():
        for module in model:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                w = module.weight.flatten(1)
                low = torch.randn(len(w), 3) @ torch.randn(3, w.shape[1])
                module.weight.add_((0.3 * w.std() * low).reshape(module.weight.shape))
    return model


FORMATS = [
    ("tt", {}),
    ("tt", {"order": 2}),
    ("tucker2", {}),
    ("cp", {}),
    ("cp4", {}),
    ("svd", {}),
    ("tr", {}),
    ("tr", {"order": 2}),
]


class PerToken(nn.Module):
    """A linear layer applied to every token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(24, 60), nn.Linear(60, 24)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("by", ["params", "macs"])
@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_prediction_is_exact_and_the_budget_met(format, options, by):
    model = network()
    plan = tdlib.plan(model, SHAPE, format=format, ratio=1.7, by=by, **options)
    assert abs(plan.ratio / 1.7 - 1) <= 0.02
    dense, cost = tdlib.count(model, SHAPE), tdlib.count(skeleton(model, plan), SHAPE)
    assert (plan.params, plan.macs) == (cost.params, cost.macs)
    assert (plan.dense_params, plan.dense_macs) == (dense.params, dense.macs)
    assert plan.params_ratio == pytest.approx(dense.weights / cost.weights)
    assert plan.macs_ratio == pytest.approx(dense.macs / cost.macs)
    assert plan.ratio == (plan.macs_ratio if by == "macs" else plan.params_ratio)


def test_linear_layers_over_tokens_and_tt_matrix():
    model = PerToken()
    for options in (
        {},
        {"order": 3},
        {"out_modes": {"first": (10, 6), "*": (6, 4)}, "in_modes": {"second": (6, 10)}},
    ):
        plan = tdlib.plan(model, (7, 24), format="tt-matrix", ratio=3, **options)
        cost = tdlib.count(tdlib.decompose(model, plan), (7, 24))
        assert (plan.params, plan.macs) == (cost.params, cost.macs) and abs(plan.ratio / 3 - 1) <= 0.02
    assert plan["first"].options["out_modes"] == (10, 6)
    assert plan["second"].options["in_modes"] == (6, 10)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("ratio", [1.15, 2.0, 5.0])
@pytest.mark.parametrize("by", ["params", "macs"])
def test_every_rule_meets_the_budget(rule, ratio, by):
    model = network()
    plan = tdlib.plan(model, SHAPE, format="tucker2", ratio=ratio, by=by, rule=rule)
    assert abs(plan.ratio / ratio - 1) <= 0.02 and plan.rule == rule
    small = tdlib.decompose(model, plan)
    assert small(torch.zeros(1, *SHAPE)).isfinite().all()


@pytest.mark.parametrize("rule", ["uniform", "energy", "global"])
def test_rules_for_formats_without_unfoldings(rule):
    model = network()
    for format in ("cp", "tr"):
        plan = tdlib.plan(model, SHAPE, format=format, ratio=2, rule=rule)
        assert abs(plan.ratio / 2 - 1) <= 0.02
    with pytest.raises(TdlibError, match="unfoldings"):
        tdlib.plan(model, SHAPE, format="cp", rule="evbmf")


@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0])
def test_coarse_ranks(ratio):
    """Few channels: the uniform family alone jumps by far more than 2 %."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
    for format in ("tt", "tucker2"):
        assert abs(tdlib.plan(model, (4, 8, 8), format=format, ratio=ratio).ratio / ratio - 1) <= 0.02


def test_unreachable_ratios_name_the_best():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
    ones = sum(i + 9 + o for i, o in ((4, 8), (8, 8)))
    best = (4 * 8 * 9 + 8 * 8 * 9) / ones
    for ratio in (best + 0.01, 100):
        with pytest.raises(BudgetError, match=f"best reachable is {math.floor(best * 1000) / 1000:.3f}"):
            tdlib.plan(model, (4, 8, 8), ratio=ratio)
    plan = tdlib.plan(model, (4, 8, 8), ratio=math.floor(best * 1000) / 1000)
    assert all(layer.ranks == (1, 1) for layer in plan.values())
    for ratio in (1.0, 0.5, -2, float("nan"), float("inf")):
        with pytest.raises(BudgetError, match="larger than 1"):
            tdlib.plan(model, (4, 8, 8), ratio=ratio)
    # Ranks 1, 2, ... of a single matrix: nothing within 2 % of this ratio.
    with pytest.raises(BudgetError, match=r"nearest reachable: 1\.250 and 1\.667"):
        tdlib.plan(nn.Sequential(nn.Linear(10, 10, bias=False)), (10,), ratio=1.45)


def test_what_stays_dense_and_why():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 16, 3, padding=1)
            self.tiny = nn.Conv2d(16, 16, 1)
            self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
            self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
            self.line = nn.Conv1d(8, 8, 3, padding=1, groups=8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.unused = nn.Linear(8, 8)
            self.tied, self.twin = nn.Linear(8, 8), nn.Linear(8, 8)
            self.twin.weight = self.tied.weight
            self.one = nn.Linear(8, 1)

        def forward(self, x):
            x = self.up(self.grouped(self.depthwise(self.tiny(self.conv(x)))))
            x = self.line(x.flatten(2)).mT
            x = self.attention(x, x, x)[0]
            return self.one(self.twin(self.tied(self.normed(x)))).mean(1)

    torch.manual_seed(0)
    model = Mixed()
    plan = tdlib.plan(model, (8, 4, 4), ratio=1.2, skip=("tin*",))
    reasons = {
        "tiny": "skipped on request",
        "depthwise": "depthwise",
        "grouped": "2 groups",
        "up": "transposed",
        "line": "depthwise",
        "attention": "holds in_proj_weight",
        "attention.out_proj": "never called",
        "normed": "parametrised",
        "unused": "never called",
        "tied": "shared with twin",
        "twin": "shared with tied",
        "one": "cannot gain",
    }
    assert set(plan.skipped) == reasons.keys() and set(plan) == {"conv"}
    for name, words in reasons.items():
        assert words in plan.skipped[name], name
    assert str(plan).count(": its weight or bias is shared with") == 2
    dense = tdlib.count(model, (8, 4, 4))
    assert plan.skipped_costs["attention.out_proj"] == dense.under("attention.out_proj")
    assert plan.skipped_costs["normed"] == dense.under("normed")
    planned = dense.under("conv")[0]
    assert sum(params for params, _ in plan.skipped_costs.values()) == dense.params - planned
    small = tdlib.decompose(model, plan)
    assert tdlib.count(small, (8, 4, 4)).params == plan.params
    plan = tdlib.plan(network(), SHAPE, format="tt-matrix", ratio=1.05)
    assert "does not apply to a conv" in plan.skipped["0"]


def test_whatever_holds_a_matrix_is_listed_whatever_it_is():
    class Conv1D(nn.Module):  # as in Hugging Face's GPT-2
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(16, 16)), nn.Parameter(torch.ones(16))

        def forward(self, x):
            return x @ self.weight + self.bias

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mixed, self.rnn = nn.Embedding(5, 16), Conv1D(), nn.LSTM(16, 16)
            self.norm, self.place = nn.LayerNorm((3, 16)), nn.Parameter(torch.zeros(1, 3, 16))
            self.scale = nn.Parameter(torch.ones(16, 1))
            self.head = nn.Linear(16, 16)

        def forward(self, x):
            x = self.table(x.long().flatten(1)) * self.scale[:, 0] + self.place
            return self.head(self.rnn(self.mixed(self.norm(x)))[0])

    skipped = tdlib.plan(Words(), (3,), "svd", 1.05).skipped
    assert list(skipped) == ["", "table", "mixed", "rnn"]
    assert "Words is neither a convolution nor Linear (it holds place)" in skipped[""]
    assert "Embedding is neither" in skipped["table"] and "Conv1D is neither" in skipped["mixed"]
    assert "weight_ih_l0" in skipped["rnn"]


def test_explicit_ranks_are_copied_clipped_and_never_changed():
    model = network()
    table = {"3": [100, 4], "5": (6, 8), "9": 4}
    plan = tdlib.plan(model, SHAPE, format="tucker2", ranks=table)
    assert plan.ranks == {"3": (12, 4), "5": (6, 8), "9": (4,)} and plan.rule == "explicit"
    assert table == {"3": [100, 4], "5": (6, 8), "9": 4}
    assert plan.skipped["0"] == "not in the rank table"
    assert tdlib.count(tdlib.decompose(model, plan), SHAPE).macs == plan.macs
    # At full ranks nothing is gained.
    assert "not smaller" in tdlib.plan(model, SHAPE, format="tucker2", ranks={"3": (12, 8)}).skipped["3"]
    globbed = tdlib.plan(model, SHAPE, format="tucker2", ranks={"[35]": (5, 5)})
    assert globbed.ranks == {"3": (5, 5), "5": (5, 5)}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"ratio": 2, "format": "tuker"}, UnknownName, "tucker2"),
        ({"ratio": 2, "rule": "unifrom"}, UnknownName, "uniform"),
        ({"ratio": 2, "by": "flops"}, UnknownName, "macs"),
        ({"ratio": 2, "skip": ("conv1",)}, UnknownName, "conv1"),
        ({"ratio": 2, "modes": 3}, UnknownName, "order"),
        ({"ratio": 2, "format": "tucker2", "order": 3}, UnknownName, "order"),
        ({}, TdlibError, "ratio="),
        ({"rule": "global"}, TdlibError, "ratio="),
        ({"ratio": 2, "ranks": {"3": (1, 1)}}, TdlibError, "not both"),
        ({"ranks": {"3": (0, 1)}}, RankError, "'3'.*at least 1"),
        ({"ranks": {"3": (1,)}}, RankError, "'3'.*takes 2 ranks"),
        ({"ranks": {"3": (1.5, 1)}}, RankError, "'3'.*rank 1.5"),
        ({"ranks": {"conv": (1, 1)}}, UnknownName, "conv"),
        ({"ratio": 2, "out_modes": (5, 5)}, RankError, "multiply to 25"),
        ({"rule": "energy", "energy": 1.5}, TdlibError, "share"),
        ({"rule": "energy", "energy": 0.5, "ratio": 2}, TdlibError, "in place of a ratio.*ratio=2"),
        ({"rule": "global", "energy": 0.5, "ratio": 2}, TdlibError, "rule='global'"),
        ({"energy": 0.5}, TdlibError, "rule='energy'"),
        ({"ranks": {"3": (1, 1)}, "rule": "uniform"}, TdlibError, "a rule or an explicit table"),
        ({"ranks": {"3": (1, 1)}, "energy": 0.5}, TdlibError, "energy or an explicit table"),
        ({"ranks": {"3": (1, 1)}, "multiple": 4}, TdlibError, "a multiple or an explicit table"),
        ({"ranks": {"3": (1, 1)}, "statistics": {}}, TdlibError, "statistics or an explicit table"),
        ({"ratio": 2, "statistics": {}}, TdlibError, "'uniform' would ignore"),
        ({"ratio": 2, "rule": "energy", "statistics": {}}, TdlibError, "'energy' would ignore"),
    ],
)
def test_bad_requests(arguments, error, words):
    with pytest.raises(error, match=words):
        tdlib.plan(network(), SHAPE, **arguments)


def test_a_model_without_layers():
    with pytest.raises(TdlibError, match="nothing to compress"):
        tdlib.plan(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), SHAPE, ratio=2)
    with pytest.raises(TdlibError, match="depthwise"):
        tdlib.plan(nn.Sequential(nn.Conv2d(3, 3, 3, groups=3)), SHAPE, ratio=2)


def test_rules_without_a_ratio():
    model = network()
    loose = tdlib.plan(model, SHAPE, format="tucker2", rule="energy", energy=0.9)
    tight = tdlib.plan(model, SHAPE, format="tucker2", rule="energy", energy=0.5)
    assert loose.params_ratio < tight.params_ratio
    low = nn.Sequential(nn.Linear(60, 80, bias=False))
    with torch.no_grad():
        low[0].weight.copy_(torch.randn(80, 4) @ torch.randn(4, 60) + 0.05 * torch.randn(80, 60))
    assert tdlib.plan(low, (60,), format="svd", rule="evbmf").ranks == {"0": (4,)}
    assert tdlib.plan(low, (60,), format="svd", rule="energy", energy=0.99).ranks == {"0": (4,)}
    with torch.no_grad():
        low[0].weight.copy_(torch.randn(80, 60))
    assert "rank 0" in tdlib.plan(low, (60,), format="svd", rule="evbmf").skipped["0"]


def test_global_spends_where_it_buys_most():
    """Two layers of equal cost, one of rank 3 and one of full rank: the budget goes to the second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(40, 3) @ torch.randn(3, 40))
        model[1].weight.copy_(torch.linalg.qr(torch.randn(40, 40))[0])
    plan = tdlib.plan(model, (40,), format="svd", ratio=2, rule="global")
    assert plan.ranks["0"] == (3,) and plan.ranks["1"][0] > 15
    uniform = tdlib.plan(model, (40,), format="svd", ratio=2)

    def errors(p):
        small = tdlib.decompose(model, p)
        return sum(
            float((tdlib.to_dense(a) - b.weight).detach().norm() / b.weight.detach().norm())
            for a, b in zip(small, model, strict=True)
        )

    assert errors(plan) < errors(uniform)


def test_global_with_statistics_looks_at_the_inputs():
    """The same orthogonal kernel twice, but the second layer's inputs live in 5 of 40 dimensions."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 40))[0]
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(q)
    narrow = torch.zeros(40, 40, dtype=torch.float64)
    narrow[:5, :5] = torch.eye(5)
    stats = {"0": torch.eye(40, dtype=torch.float64), "1": narrow}
    plan = tdlib.plan(model, (40,), format="svd", ratio=2, rule="global", statistics=stats)
    assert plan.ranks["1"][0] <= 6 < plan.ranks["0"][0]
    with pytest.raises(TdlibError, match="lack"):
        tdlib.plan(model, (40,), format="svd", ratio=2, rule="global", statistics={"0": narrow})


def test_global_with_fisher_weights_looks_at_the_outputs():
    """The same kernel and inputs twice, but only 5 of the second layer's 40 outputs matter."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 40))[0]
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(q)
    all_, few = torch.eye(40, dtype=torch.float64), torch.diag((torch.arange(40) < 5).double())
    stats = tdlib.Statistics({"0": all_, "1": all_}, {}, {}, weights={"0": all_, "1": few})
    plan = tdlib.plan(model, (40,), format="svd", ratio=2, rule="global", statistics=stats)
    assert plan.ranks["1"][0] <= 6 < plan.ranks["0"][0]


@pytest.mark.parametrize("format", ["svd", "tucker2", "tt"])
def test_roots_of_large_matrices_give_the_same_ranks(monkeypatch, format):
    model = network()
    stats = tdlib.statistics(model, [torch.randn(700, *SHAPE)], output_weights=True)
    plan = tdlib.plan(model, SHAPE, format, 2, rule="global", statistics=stats)
    monkeypatch.setattr("tdlib.planning.curves.LARGE", 4)
    assert tdlib.plan(model, SHAPE, format, 2, rule="global", statistics=stats).ranks == plan.ranks


def test_global_ranks_of_curves_by_hand():
    curves = {
        "a": [((1,), 10, 0.9), ((2,), 20, 0.2), ((3,), 30, 0.19)],
        "b": [((1,), 10, 0.5), ((2,), 20, 0.4), ((3,), 30, 0.1)],
    }
    dense = {"a": 40, "b": 40}
    assert global_ranks(curves, dense, 20) == {"a": (1,), "b": (1,)}
    assert global_ranks(curves, dense, 30) == {"a": (2,), "b": (1,)}
    assert global_ranks(curves, dense, 50) == {"a": (2,), "b": (3,)}
    assert global_ranks(curves, dense, 80) == {"a": None, "b": None}


def test_plan_is_a_mapping_and_survives_json():
    model = network()
    plan = tdlib.plan(model, SHAPE, ratio=2, order=2, skip="0")
    again = tdlib.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and dict(again) == dict(plan) and again.skipped == plan.skipped
    assert plan["5"] == LayerPlan("tt", plan.ranks["5"], {"out_modes": (4, 4), "in_modes": (3, 4)})
    assert plan.ranks == {name: layer.ranks for name, layer in plan.items()}
    assert again.ratio == plan.ratio and again.macs == plan.macs and str(again) == str(plan)
    assert "norm layers' parameters left out" in str(plan)
    assert list(plan.to_frame().layer) == list(plan) and plan.layers_ratio > plan.ratio
    for wrong in ({"layers": {}}, {**plan.to_dict(), "layers": {"5": {"ranks": [1]}}}):
        with pytest.raises(TdlibError, match=r"not a plan|has format, ranks"):
            tdlib.Plan.from_dict(wrong)


def test_papers_uniform_fractions_for_resnet32():
    """Fractions near .55 give 2.3 times fewer parameters in ResNet-32 with first and last layer dense."""
    model = tdlib.models.build("resnet32", 10)
    plan = tdlib.plan(model, (3, 32, 32), ratio=2.33, skip=("conv1", "linear"))
    assert abs(plan.ratio - 2.33) < 0.0466 and abs(plan.macs_ratio - 2.26) < 0.1
    assert plan.ranks["layer2.1.conv1"][0] in (17, 18) and plan.ranks["layer3.1.conv2"][0] in (34, 35, 36)


@pytest.mark.parametrize("rule", ["uniform", "energy", "global"])
@pytest.mark.parametrize("format", ["tucker2", "tt", "svd", "cp"])
def test_ranks_are_multiples_or_bounds_and_the_budget_is_met(rule, format):
    torch.manual_seed(0)
    model = tdlib.models.build("resnet20", 10)
    plan = tdlib.plan(model, (3, 32, 32), format, 2.0, rule=rule, multiple=4)
    for name, layer in plan.items():
        bounds = layer.bind(plan.costs[name].shape).bounds
        assert all(r % 4 == 0 or r == b for r, b in zip(layer.ranks, bounds, strict=True)), (name, bounds)
    assert plan.ratio == pytest.approx(2.0, rel=0.02)
    assert any(r % 8 for layer in plan.values() for r in layer.ranks)  # not coarser than asked for


def test_a_multiple_below_one_is_refused():
    with pytest.raises(RankError, match="multiple must be at least 1"):
        tdlib.plan(tdlib.models.build("cnn", 10), (1, 8, 8), "tucker2", 2.0, multiple=0)


def test_an_unreachable_ratio_says_what_stays_dense_and_why():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x * 2)

    model = nn.Sequential(*(Own(8, 8, 3) for _ in range(3)), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, groups=8))
    words = (
        r"with every rank at 1; \d\d\.\d % of the macs cannot shrink: 4 of 5 layers stay dense, "
        r"3× 'Own has a forward of its own'; 1× 'depthwise convolution'"
    )
    with pytest.raises(BudgetError, match=words):
        tdlib.plan(model, (8, 16, 16), ratio=2, by="macs")
    text = str(tdlib.plan(model, (8, 16, 16), ratio=1.05))
    assert "dense: 0, 1, 2: Own has a forward of its own (7" in text
    assert text.index("forward of its own") < text.index("depthwise")


class Two(nn.Module):
    """Tokens through an embedding, with a mask: integer inputs, two of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first, self.second = nn.Embedding(50, 24), nn.Linear(24, 100), nn.Linear(100, 60)

    def forward(self, tokens, mask=None):
        x = self.table(tokens) if mask is None else self.table(tokens) * mask[..., None]
        return self.second(self.first(x).relu()).mean(1)


def test_networks_of_integer_inputs_and_of_several():
    model, tokens, mask = Two(), torch.arange(7)[None], torch.ones(1, 7)
    macs = 7 * (24 * 100 + 100 * 60)
    for given in (tokens, (tokens,), [tokens, mask], {"tokens": tokens, "mask": mask}):
        cost = tdlib.count(model, example_inputs=given)
        assert cost.macs == macs and cost.layers[1].in_shape == (1, 7, 24)
        plan = tdlib.plan(model, format="svd", ratio=2, by="macs", example_inputs=given)
        assert set(plan) == {"first", "second"} and plan.ratio == pytest.approx(2, rel=0.02)
        assert "table" in plan.skipped
        small = tdlib.decompose(model, plan)
        assert tdlib.count(small, example_inputs=given).macs == plan.macs
        table = tdlib.compare(model, small, example_inputs=given, batch=3, repeats=1)
        assert table.whole["macs_ratio"] == plan.ratio and table.whole["ms"] > 0
    assert tdlib.count(model, example_inputs=tokens).input_shape == (7,)
    assert tdlib.count(model, example_inputs=(tokens, mask)).input_shape == ((7,), (7,))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give either"),
        ({"input_shape": (7,), "example_inputs": torch.zeros(1, 7)}, "give either"),
        ({"example_inputs": torch.zeros(2, 7)}, r"batch of 1 in front, got \(2, 7\)"),
        ({"example_inputs": (torch.zeros(1, 7), 3)}, "batch of 1 in front, got 3"),
        ({"example_inputs": ()}, "are tensors"),
        ({"example_inputs": 7}, "are tensors, got int"),
        ({"input_shape": (7,)}, r"shape \(7,\): RuntimeError"),
    ],
)
def test_inputs_that_are_none(given, words):
    for call in (tdlib.count, tdlib.plan):
        with pytest.raises(TdlibError, match=words):
            call(Two(), **given)


def test_whatever_a_forward_raises_is_named():
    class Fussy(nn.Linear):
        def forward(self, x):
            assert x.shape[-1] == 3, "wrong size"
            return super().forward(x)

    with pytest.raises(TdlibError, match=r"shape \(4,\): AssertionError: wrong size") as caught:
        tdlib.count(Fussy(3, 3), (4,))
    assert isinstance(caught.value.__cause__, AssertionError)


def test_layers_that_share_a_bias_stay_dense():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[2].bias = model[1].bias
    plan = tdlib.plan(model, (16,), "svd", 1.2)
    assert set(plan) == {"0"} and "bias is shared with 2" in plan.skipped["1"]
    assert tdlib.count(tdlib.decompose(model, plan), (16,)).params == plan.params


def test_a_budget_out_of_reach_says_what_no_layer_holds():
    """Products of a parent with a layer's weight are the parent's, which holds no matrix of its own."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.called = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.called(nn.functional.linear(x, self.used.weight))

    with pytest.raises(BudgetError, match=r"50\.0 % of the macs cannot shrink: 1 of 2 layers"):
        tdlib.plan(Functional(), (32,), "svd", 3.0, "macs")
