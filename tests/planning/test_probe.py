"""The probe: networks that do more with a layer than call it keep that layer, and only that one."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tdlib
from tdlib.errors import BudgetError, TdlibError
from tdlib.planning import probe as module


class Parent(nn.Module):
    """Four linear layers; what `use` does with the second is up to the subclass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        return self.d(self.c(self.use(self.a(x)).relu()))


class Calls(Parent):
    def use(self, x):
        return self.b(x)


class ReadsWeight(Parent):
    def use(self, x):
        return self.b(x).to(self.b.weight.dtype) + x @ self.b.weight.mT / self.b.in_features


class ReadsData(Parent):
    def use(self, x):
        return self.b(x) * self.b._parameters["weight"].std()


class AsksForTheClass(Parent):
    def use(self, x):
        return self.b(x) if isinstance(self.b, nn.Linear) else -self.b(x)


class AsksForBoth(Parent):
    """Either of b and c may go, but not both."""

    def use(self, x):
        both = not isinstance(self.b, nn.Linear) and not isinstance(self.c, nn.Linear)
        return -self.b(x) if both else self.b(x)


class AsksForAName(Parent):
    def __init__(self):
        super().__init__()
        self.b = type("Scaled", (nn.Linear,), {"scale": 2.0})(16, 16)

    def use(self, x):
        return self.b(x) * getattr(self.b, "scale", 1.0)


@pytest.mark.parametrize(
    ("network", "dense", "words"),
    [
        (Calls, [], ""),
        (ReadsWeight, [], ""),
        (ReadsData, ["b"], "KeyError"),
        (AsksForTheClass, ["b"], "output differs"),
        (AsksForBoth, ["c"], "output differs"),
        (AsksForAName, ["b"], "output differs"),
    ],
)
@pytest.mark.parametrize("format", ["svd", "tt", "shuffled-tt"])
def test_only_the_layers_that_a_parent_needs_stay_dense(network, dense, words, format):
    options = {"order": 2} if format == "tt" else {}
    if format == "shuffled-tt" and network is not ReadsData:
        dense = []  # still an nn.Linear, of the same class, with a weight
    model = network()
    plan = tdlib.plan(model, (16,), format, 1.2, **options)
    assert list(plan.skipped) == dense and all(words in reason for reason in plan.skipped.values())
    small = tdlib.decompose(model, plan)
    assert small(torch.ones(2, 16)).shape == (2, 16)


def test_a_forward_that_holds_on_to_the_original_layers_is_found():
    model = nn.Sequential(Calls(), Calls())
    block = model[1]
    block.forward = lambda x: block.d(block.a(x))
    plan = tdlib.plan(model, (16,), "svd", 1.2)
    assert set(plan) == {"0.a", "0.b", "0.c", "0.d"}
    assert "holds on" in plan.skipped["1.a"] and "never called" in plan.skipped["1.b"]


class InAList(Calls):
    def __init__(self):
        super().__init__()
        self.held = [self.b, {"c": self.c}]  # no ModuleList: torch does not look into it

    def forward(self, x):
        return self.d(self.held[1]["c"](self.held[0](self.a(x)).relu()))


@pytest.mark.parametrize("format", ["svd", "shuffled-tt"])
def test_a_layer_that_a_plain_list_holds_stays_dense(format):
    """It would go on computing, beside a chain that nobody calls."""
    plan = tdlib.plan(InAList(), (16,), format, 1.2)
    assert set(plan) == {"a", "d"} and all("a list" in plan.skipped[name] for name in "bc")


@dataclass
class Output:
    scores: torch.Tensor


class AsksAndWraps(AsksForTheClass):
    def forward(self, x):
        return [Output(super().forward(x))]


def test_outputs_in_an_object_are_compared():
    assert list(tdlib.plan(AsksAndWraps(), (16,), "svd", 1.2).skipped) == ["b"]


class Stateful(Calls):
    """A buffer that every forward pass replaces by another tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.zeros(1, 16))

    def forward(self, x):
        self.state = super().forward(x) + self.state
        return self.state


def test_buffers_that_a_forward_replaces_are_put_back():
    model = Stateful()
    state = model.state
    tdlib.plan(model, (16,), "svd", 1.2)
    tdlib.compare(model, model, (16,), repeats=1)
    assert model.state is state and not state.any()


class Reals(Calls):
    def __init__(self):
        super().__init__()
        self.c = nn.Linear(16, 16, dtype=torch.cfloat)
        self.b.register_buffer("weight", self.b._parameters.pop("weight").detach())

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x)).to(torch.cfloat)).abs())


def test_only_real_parameters_are_decomposed():
    model = Reals()
    plan = tdlib.plan(model, (16,), "svd", 1.2)
    assert set(plan) <= {"a", "d"} and all("no real parameter" in plan.skipped[name] for name in "bc")
    with pytest.raises(TdlibError, match="no real parameter"):
        tdlib.decompose(model, {"c": {"format": "svd", "ranks": [2]}})


class ByName(Calls):
    def use(self, x):
        return self.b(input=x)


def test_layers_called_with_named_arguments_are_layers_like_others():
    model, x = ByName(), torch.randn(64, 16)
    found = tdlib.statistics(model, [x], output_weights=True)
    plan = tdlib.plan(model, (16,), "svd", 1.2)
    small = tdlib.decompose(model, plan, found)
    assert "b" in plan and small(x).shape == (64, 16)
    assert tdlib.count(small, (16,)).macs == plan.macs


def test_the_network_is_as_before_and_one_trial_is_enough(monkeypatch):
    trials, trial = [], module._trial
    monkeypatch.setattr(module, "_trial", lambda *given: trials.append(1) or trial(*given))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 8, 3)).train()
    model[0].eval()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert len(tdlib.plan(model, (3, 8, 8), "tucker2", 1.2)) and len(trials) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model] == [False, True, True, True]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_chance_in_the_forward_is_no_difference():
    class Noisy(Calls):
        def use(self, x):
            return self.b(x) + torch.randn_like(x)

    assert not tdlib.plan(Noisy(), (16,), "svd", 1.2).skipped


def test_a_budget_that_the_remaining_layers_cannot_meet_is_refused():
    class ReadsAll(Calls):
        def forward(self, x):
            return super().forward(x) * sum(m._parameters["weight"].sum() for m in self.children())

    with pytest.raises(TdlibError, match=r"nothing to compress.*KeyError"):
        tdlib.plan(ReadsAll(), (16,), "svd", 1.2)
    with pytest.raises(BudgetError):
        tdlib.plan(nn.Sequential(ReadsAll(), nn.Linear(16, 16)), (16,), "svd", 2.0)


@pytest.mark.parametrize("format", ["svd", "tt"])
def test_a_transformer_is_planned_and_runs_in_both_modes(format):
    """In eval mode torch's fast path reads the weights of the layers instead of calling them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    plan = tdlib.plan(model, (5, 32), format, 1.3, **({"order": 2} if format == "tt" else {}))
    assert "layers.0.linear1" in plan and "holds in_proj_weight" in plan.skipped["layers.0.self_attn"]
    small, x = tdlib.decompose(model, plan), torch.randn(3, 5, 32)
    dense = copy.deepcopy(model)
    for name in plan:
        dense.get_submodule(name).weight.data = tdlib.to_dense(small.get_submodule(name)).detach()
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x), dense.eval()(x), rtol=1e-4, atol=1e-5)
        assert small.train()(x).isfinite().all()
    small(x).square().mean().backward()
    assert all(p.grad is not None for p in small.get_submodule("layers.0.linear1").parameters())
