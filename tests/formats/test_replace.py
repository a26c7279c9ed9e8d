"""Replacing layers in a model: what is kept, what is recorded, what is refused."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import tdlib
from tdlib.errors import DataError, NonFiniteError, RankError, TdlibError, UnknownName
from tdlib.formats import LayerPlan, decompose, install, skeleton, to_dense
from tdlib.formats.chains import Chain
from tdlib.formats.contraction import RingConv2d
from tdlib.network import Provenance, attach, provenance


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
    return {name: LayerPlan(format, chosen) for name, (format, chosen) in ranks.items()}


def test_input_model_is_untouched_and_the_result_shares_nothing():
    model = Net().eval()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    small = decompose(model, table(stem=("tucker2", (3, 2)), head=("svd", (2,))))
    assert torch.equal(torch.get_rng_state(), rng)
    with torch.no_grad():
        for p in small.parameters():
            p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert provenance(model) == Provenance() and type(model.stem) is nn.Conv2d


def test_a_shared_module_is_replaced_everywhere():
    model = Net()
    plan = tdlib.plan(model, (3, 6, 6), ratio=1.5)
    assert "again" not in plan and "body" in plan
    small = decompose(model, plan)
    assert small.again is small.body and type(small.body) is Chain
    cost = tdlib.count(small, (3, 6, 6))
    assert (cost.params, cost.macs) == (plan.params, plan.macs)


def test_a_single_layer_can_be_the_model():
    layer = nn.Linear(6, 8)
    small = decompose(layer, {"": LayerPlan("svd", (6,))})
    x = torch.ones(2, 6)
    torch.testing.assert_close(small(x), layer(x), rtol=1e-4, atol=1e-5)
    assert provenance(small).layers == {"": LayerPlan("svd", (6,))}


def test_a_subclass_that_computes_alike_is_replaced_one_with_its_own_forward_is_not():
    class Named(nn.Conv2d):
        pass

    class Louder(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Named(8, 8, 3), Louder(8, 8, 3))
    plan = tdlib.plan(model, (8, 6, 6), "tucker2", 1.2)
    assert list(plan) == ["0"] and "forward of its own" in plan.skipped["1"]
    assert type(decompose(model, plan)[0]) is Chain
    with pytest.raises(TdlibError, match="layer '1' stays dense: Louder has a forward of its own"):
        decompose(model, {"1": plan["0"]})


def clamped(layer):
    layer.register_forward_hook(lambda module, args, output: output.clamp(0, 0.1))


def seen(layer):
    layer.register_forward_pre_hook(lambda module, args: None)


def listened(layer):
    layer.register_full_backward_hook(lambda module, gradients, _: None)


def patched(layer):
    plain = layer.forward
    layer.forward = lambda x: 3 * plain(x)


def buffered(layer):
    layer.register_buffer("scale", torch.ones(1))


def marked(layer):
    layer.scale = 2.0


OBSTACLES = [
    (clamped, "hooks.*lambda"),
    (seen, "hooks.*lambda"),
    (listened, "hooks"),
    (patched, "forward is patched"),
    (buffered, r"attributes of its own \(scale\)"),
    (marked, r"attributes of its own \(scale\)"),
    (nn.utils.spectral_norm, "hooks.*SpectralNorm"),
    (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "hooks.*L1Unstructured"),
    (nn.utils.parametrizations.weight_norm, "parametrised"),
]


@pytest.mark.parametrize(("change", "words"), OBSTACLES)
def test_what_hangs_on_a_layer_is_never_dropped(change, words):
    model = Net()
    plan = tdlib.plan(model, (3, 6, 6), "svd", 1.5)
    change(model.body)
    skipped = tdlib.plan(model, (3, 6, 6), "svd", 1.05).skipped["body"]
    assert re.search(words, skipped)
    for make in (decompose, skeleton):
        with pytest.raises(TdlibError, match=f"'body' stays dense: .*{words}"):
            make(model, plan)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_that_is_computed_before_every_pass_is_copied_with_its_layer():
    model = Net()
    nn.utils.weight_norm(model.body)
    model(torch.ones(1, 3, 6, 6))
    with pytest.raises(TdlibError, match="WeightNorm"):
        decompose(model, table(body=("svd", (8,))))
    small, x = decompose(model.eval(), table(head=("svd", (4,)))), torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    model.body.weight_g.data.mul_(2)  # the copy has its own
    assert not torch.allclose(small(x), model(x))


def test_what_has_no_layers_or_no_values_is_named():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).eval()
    x = torch.ones(1, 8, 6, 6)
    plan = tdlib.plan(model, (8, 6, 6), "svd", 1.2)
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(4))
    program = torch.export.export(model, (x,))
    for bad, words in (
        (lazy, "'0.weight' is not initialised yet"),
        (program, "got ExportedProgram"),
        (program.module(), "before torch.export"),
        (torch.export.unflatten(program), "before torch.export"),
    ):
        for call in (
            lambda bad=bad: tdlib.count(bad, (8, 6, 6)),
            lambda bad=bad: tdlib.plan(bad, (8, 6, 6), "svd", 1.2),
            lambda bad=bad: decompose(bad, plan),
        ):
            with pytest.raises(TdlibError, match=words):
                call()
    assert isinstance(lazy[0], nn.LazyConv2d)  # counting has not run it
    lazy(x)
    assert list(tdlib.plan(lazy, (8, 6, 6), "svd", 1.2)) == list(plan)
    meta = copy.deepcopy(model).to("meta")
    assert tdlib.count(meta, (8, 6, 6)).macs == tdlib.count(model, (8, 6, 6)).macs
    with pytest.raises(NonFiniteError, match="layer '0' is on the meta device"):
        decompose(meta, plan)
    with pytest.raises(NonFiniteError, match="meta device"):
        tdlib.plan(meta, (8, 6, 6), "svd", 1.2, rule="global")


def test_a_layers_plan_may_be_the_plain_dict_that_is_saved():
    planned = LayerPlan("tt", (3, 4, 2, 2), {"out_modes": (2, 4), "in_modes": [2, 4]})
    assert planned.options["in_modes"] == (2, 4)  # as JSON gives it back
    row = planned.to_dict()
    assert row == {
        "format": "tt",
        "ranks": [3, 4, 2, 2],
        "options": {"out_modes": [2, 4], "in_modes": [2, 4]},
    }
    assert LayerPlan.of(row) == LayerPlan.of(planned) == planned and len({planned, LayerPlan.of(row)}) == 1
    torch.manual_seed(0)
    model = Net()
    a, b = (decompose(model, {"body": plan}).state_dict() for plan in (planned, row))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for bad in ({"format": "tt"}, {"format": "tt", "ranks": 3}, "tt", None):
        with pytest.raises(TdlibError, match="has format, ranks"):
            decompose(model, {"body": bad})


def test_the_record_of_what_was_replaced_grows_and_is_copied():
    model = Net()
    attach(model, Provenance(spec={"name": "x", "classes": 4, "kwargs": {}}))
    once = decompose(model, table(body=("tucker2", (100, 5))))
    twice = decompose(once, {"body.1": LayerPlan("svd", (4,))})
    assert provenance(model).layers == {}
    assert provenance(once).layers == table(body=("tucker2", (8, 5)))  # effective ranks
    assert list(provenance(twice).layers) == ["body", "body.1"]
    assert provenance(twice).spec == provenance(model).spec
    assert provenance(copy.deepcopy(twice)) == provenance(twice)
    assert skeleton(model, provenance(twice).layers).state_dict().keys() == twice.state_dict().keys()


def test_install_puts_a_module_of_ones_own_everywhere():
    model = Net()
    other = decompose(model, table(body=("svd", (3,)))).body
    assert install(model, "body", other, LayerPlan("svd", (3,))) is model
    assert model.body is model.again is other
    assert provenance(model).layers == table(body=("svd", (3,)))


@pytest.mark.parametrize(
    ("outer", "inner", "ranks"), [("tucker2", "body.1", (7, 5)), ("tr", "body.middle", (2, 3, 3))]
)
def test_what_is_inside_a_replaced_layer_can_be_replaced_too(outer, inner, ranks):
    once = decompose(Net(), table(body=(outer, ranks)))
    assert isinstance(once.body, Chain if outer == "tucker2" else RingConv2d)
    twice = decompose(once, {inner: LayerPlan("svd", (100,))})
    torch.testing.assert_close(to_dense(twice.body), to_dense(once.body), rtol=1e-4, atol=1e-5)


def test_statistics_lower_the_output_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 5)).double()
    batches = [
        torch.randn(32, 4, 4, 4, dtype=torch.float64) * torch.tensor([5.0, 1, 0.2, 0.1])[:, None, None]
    ]
    stats = tdlib.statistics(model, batches)
    for format, ranks in (("tucker2", (3, 2)), ("tt", (3, 2)), ("cp", (4,))):
        rows = {"0": LayerPlan(format, ranks)}
        plain, aware = decompose(model, rows), decompose(model, rows, statistics=stats)
        target = model[0](batches[0])
        assert (aware[0](batches[0]) - target).norm() < 0.9 * (plain[0](batches[0]) - target).norm()
    with pytest.raises(DataError, match="lack 2"):
        decompose(model, {"2": LayerPlan("svd", (2,))}, statistics={"0": stats["0"]})


def test_statistics_with_fisher_weights_weigh_the_outputs():
    """Only the first of five outputs counts: its row of the kernel is kept, whatever the others say."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 5, bias=False)).double()
    weights = {"0": torch.diag(torch.tensor([1e6, 1.0, 1, 1, 1], dtype=torch.float64))}
    sigma = {"0": torch.eye(24, dtype=torch.float64)}
    stats = tdlib.Statistics(sigma, means={}, counts={}, weights=weights)
    rows = {"0": LayerPlan("svd", (1,))}
    with torch.no_grad():
        small = [decompose(model, rows, statistics=given)[0] for given in (stats, sigma)]
        first = [float((to_dense(module) - model[0].weight)[0].norm()) for module in small]
    assert first[0] < 1e-3 < 0.1 < first[1]


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (table(bodi=("svd", (1,))), UnknownName, "body"),
        (table(norm=("svd", (1,))), UnknownName, "stem"),
        (table(body=("tuker2", (1, 1))), UnknownName, "tucker2"),
        (table(body=("tucker2", (1,))), RankError, "layer 'body'.*takes 2"),
        (table(body=("tucker2", (0, 1))), RankError, "layer 'body'.*at least 1"),
        (table(body=("tucker2", (1.5, 1))), RankError, "layer 'body'.*rank 1.5"),
        (table(body=("tt-matrix", (1,))), TdlibError, "layer 'body'.*does not apply"),
        ({"head": LayerPlan("tt", (1, 1, 1), {"out_modes": (3, 2)})}, RankError, "'head'.*multiply to 6"),
        ({"head": LayerPlan("tt", (1,), {"modes": (3, 2)})}, UnknownName, "'head'.*out_modes"),
    ],
)
def test_bad_tables_are_refused(rows, error, words):
    with pytest.raises(error, match=words):
        decompose(Net(), rows)
    with pytest.raises(error, match=words):
        skeleton(Net(), rows)


def test_an_error_names_the_layer_also_where_its_name_is_a_digit():
    with pytest.raises(RankError, match="layer '3'"):
        decompose(nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(4))), {"3": LayerPlan("tucker2", (3,))})


def test_nan_names_the_layer():
    model = Net()
    model.body.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="body"):
        decompose(model, table(body=("svd", (1,))))
    with pytest.raises(NonFiniteError, match="body"):
        tdlib.plan(model, (3, 6, 6), ratio=1.5, rule="global")


def test_to_dense_refuses_what_has_no_kernel():
    for module in (
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)),
    ):
        with pytest.raises(TdlibError):
            to_dense(module)
