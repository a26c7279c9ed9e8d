"""Streamed input statistics against im2col of everything."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import tdlib
from tdlib import memory
from tdlib.calibration import (
    TEMPERATURE,
    damped,
    fisher,
    load_statistics,
    logits,
    moments,
    paired,
    recalibrate_batchnorm,
    statistics,
)
from tdlib.calibration.moments import Flat, padded
from tdlib.calibration.statistics import shrinkage_for
from tdlib.errors import CheckpointError, DataError, MemoryLimitError, NonFiniteError, TdlibError
from tdlib.files import write_tensors

CONVS = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3),
    dict(kernel_size=3, padding=2),
    dict(kernel_size=3, padding=4),
    dict(kernel_size=(3, 5), padding="same"),
    dict(kernel_size=3, padding="valid"),
    dict(kernel_size=3, padding=1, padding_mode="reflect"),
    dict(kernel_size=3, padding=1, padding_mode="circular"),
    dict(kernel_size=5, padding=2, padding_mode="replicate"),
    dict(kernel_size=3, padding=1, stride=2),
    dict(kernel_size=3, padding=1, stride=(1, 2)),
    dict(kernel_size=3, padding=2, dilation=2),
    dict(kernel_size=1),
    dict(kernel_size=1, stride=2),
    dict(kernel_size=(1, 7), padding=(0, 3)),
    dict(kernel_size=7, padding=3),
]


def im2col(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    x = padded(conv, x).double()
    columns = F.unfold(x, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


@pytest.mark.parametrize("options", CONVS, ids=str)
def test_convolution_statistics_are_exact(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 4, bias=False, **options))
    x = torch.randn(7, 5, 7, 9).relu()
    stats = statistics(model, [x[:4], (x[4:], torch.zeros(3))])
    X = im2col(model[0], x)
    assert stats.counts["0"] == len(X) == model(x)[:, 0].numel()
    torch.testing.assert_close(stats["0"], X.T @ X / len(X), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(stats.means["0"], X.mean(0), atol=1e-6, rtol=1e-6)
    W = model[0].weight.detach().double().flatten(1)
    output = model(x).detach().double().square().mean((0, 2, 3)).sum()
    assert float(torch.trace(W @ stats["0"] @ W.T)) == pytest.approx(float(output), rel=1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(3, 4, 5, stride=2, padding=2, dilation=2, bias=False),
        nn.Conv1d(3, 4, 4, padding="same", padding_mode="reflect", bias=False),
        nn.Conv1d(3, 4, 1, bias=False),
        nn.Conv3d(3, 4, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 2), dilation=(2, 1, 1), bias=False),
        nn.Conv3d(3, 4, (2, 3, 3), padding="same", padding_mode="circular", bias=False),
        nn.Conv3d(3, 4, 1, stride=2, bias=False),
    ],
    ids=str,
)
def test_convolutions_in_one_and_three_dimensions(conv):
    """Output moments follow from those of the input: E[y y^T] = W Sigma W^T, E[y] = W E[x]."""
    torch.manual_seed(0)
    model, x = nn.Sequential(conv.double()), torch.randn(30, 3, *(7, 5, 6)[: conv.weight.ndim - 2]).double()
    exact = statistics(model, [x])
    with torch.no_grad():
        y, W = conv(x).movedim(1, -1).flatten(0, -2), conv.weight.flatten(1)
    torch.testing.assert_close(W @ exact["0"] @ W.T, y.T @ y / len(y), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(W @ exact.means["0"], y.mean(0), rtol=1e-6, atol=1e-8)
    assert exact.counts["0"] == len(y)
    sampled = [statistics(model, [x], positions=2, seed=seed) for seed in range(20)]
    assert sampled[0].counts["0"] == 60
    mean = torch.stack([found["0"] for found in sampled]).mean(0)
    assert (mean - exact["0"]).norm() < 0.3 * exact["0"].norm()


def test_images_of_several_sizes_and_batches_of_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    batches = [torch.randn(1, 3, 6, 5), torch.randn(2, 3, 9, 4)]
    X = torch.cat([im2col(model[2], model[:2](x).detach()) for x in batches])
    torch.testing.assert_close(statistics(model, batches)["2"], X.T @ X / len(X), atol=1e-6, rtol=1e-6)


def test_linear_layers_flatten_positions_and_grouped_ones_are_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(40, 3, 6)
    stats = statistics(model, [x])
    h = model[:2](x).detach().double().reshape(-1, 5)
    torch.testing.assert_close(stats["2"], h.T @ h / 120, atol=1e-6, rtol=1e-6)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    assert list(statistics(grouped, [torch.randn(9, 4, 5, 5)])) == ["1"]


def test_the_model_is_left_as_it_was_and_norms_run_in_evaluation_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    model.train()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    stats = statistics(model, [torch.randn(8, 3, 9, 9)], layers=["2"])
    assert list(stats) == ["2"] and model.training and not model[0].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[2]._forward_pre_hooks


def test_sampled_positions_approach_the_exact_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    x = [torch.randn(50, 4, 12, 12).relu() for _ in range(4)]
    exact = statistics(model, x)["0"]
    errors = []
    for positions in (2, 16, 144):
        sampled = statistics(model, x, positions=positions, seed=1)
        assert sampled.counts["0"] == 200 * positions
        errors.append(float((sampled["0"] - exact).norm() / exact.norm()))
        again = statistics(model, x, positions=positions, seed=1)
        assert torch.equal(again["0"], sampled["0"])
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-6


def test_too_few_patches_warn_with_the_numbers_and_are_regularised():
    model = nn.Sequential(nn.Conv2d(8, 2, 3))
    with pytest.warns(UserWarning, match="72 x 72 .* only 9 patches"):
        sigma = statistics(model, [torch.randn(1, 8, 5, 5)])["0"]
    assert torch.linalg.eigvalsh(sigma)[0] > 0
    assert shrinkage_for("x", 10, 10) == 0


def test_bad_calibration_data_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(DataError, match="empty"):
        statistics(model, [])
    with pytest.raises(DataError, match="no Linear or convolution"):
        statistics(model, [torch.randn(9, 3)], layers=["conv*"])
    with pytest.raises(DataError, match="must be tensors"):
        statistics(model, ["a"])
    with pytest.raises(NonFiniteError, match="'0'"):
        statistics(model, [torch.full((9, 3), float("nan"))])
    with torch.no_grad():
        model[0].bias[0] = float("inf")
    with pytest.raises(NonFiniteError, match="'1'"):
        statistics(model, [torch.randn(9, 3)])


def test_saved_statistics_come_back_and_foreign_files_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))
    stats = statistics(model, [torch.randn(60, 2, 5, 5)])
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    back = load_statistics(path)
    assert list(back) == list(stats) and back.counts == stats.counts
    assert all(torch.equal(back[n], stats[n]) and torch.equal(back.means[n], stats.means[n]) for n in stats)
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]
    with pytest.raises(DataError, match="no statistics for layer 'x'"):
        stats["x"]
    with pytest.raises(CheckpointError):
        load_statistics(tmp_path / "missing.safetensors")
    path.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError):
        load_statistics(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="was not written"):
        load_statistics(path)
    header = {"tdlib": "statistics", "version": "2", "counts": json.dumps(stats.counts)}
    for part, wrong, word in (("sigma", math.nan, "NaN"), ("mean", math.inf, "NaN"), ("sigma", 9.0, "symm")):
        stats.save(path)
        tensors = load_file(path)
        tensors[f"{part}.2"].view(-1)[-2] = wrong
        write_tensors(path, tensors, header)
        with pytest.raises(CheckpointError, match=word):
            load_statistics(path)
    save_file({"a": torch.zeros(1)}, path, {"tdlib": "statistics", "version": "99"})
    with pytest.raises(CheckpointError, match="has version 99"):
        load_statistics(path)


def test_output_weights_are_the_damped_fisher_information_and_are_saved(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = [torch.randn(20, 6), torch.randn(20, 6)]
    stats = statistics(model, iter(batches), output_weights=True, seed=4)
    H = fisher(model, batches, ["0", "2"], temperature=TEMPERATURE, seed=4)
    assert all(torch.equal(stats.weights[n], damped(H[n])) for n in ("0", "2"))
    stats.save(tmp_path / "stats.safetensors")
    back = load_statistics(tmp_path / "stats.safetensors")
    assert all(torch.equal(back.weights[n], stats.weights[n]) for n in ("0", "2"))


def test_bars_are_shown_where_asked_for_and_change_nothing(capsys):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 3)), [torch.randn(20, 6)]
    quiet = statistics(model, x, output_weights=True)
    assert capsys.readouterr().err == ""
    shown = statistics(model, x, output_weights=True, progress=True)
    bars = capsys.readouterr().err
    assert "statistics" in bars and "sensitivity" in bars
    assert torch.equal(quiet["0"], shown["0"]) and torch.equal(quiet.weights["0"], shown.weights["0"])


@pytest.mark.parametrize("options", [CONVS[0], CONVS[6], CONVS[9], CONVS[12]], ids=str)
def test_paired_statistics_of_two_networks(options):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, **options))
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other[0].weight.add_(0.1 * torch.randn_like(other[0].weight))
    x = torch.randn(6, 3, 7, 8)
    found = paired(dense, other, "2", [x[:4], x[4:]])
    a, b = (im2col(m[2], m[:2](x).detach()) for m in (dense, other))
    torch.testing.assert_close(found.sigma, b.T @ b / len(b), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.cross, a.T @ b / len(a), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.mean, b.mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.dense_mean, a.mean(0), atol=1e-6, rtol=1e-6)


class Aside(nn.Module):
    """A layer that runs, one that runs in training alone, and one whose weight is used directly."""

    def __init__(self):
        super().__init__()
        self.used, self.auxiliary, self.direct = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        x = self.used(x)
        return self.auxiliary(x) if self.training else F.linear(x, self.direct.weight)


@pytest.mark.parametrize("layers", [None, "*", ["used", "*i*"]])
def test_layers_that_are_never_reached_are_left_out_with_one_warning(layers):
    with pytest.warns(UserWarning, match="auxiliary, direct; .* never reaches") as caught:
        stats = statistics(Aside(), [torch.randn(20, 4)], layers, output_weights=True)
    assert len(caught) == 1 and list(stats) == list(stats.weights) == ["used"]
    small = tdlib.plan(Aside(), (4,), "svd", ratio=45 / 37, rule="global", statistics=stats)
    assert list(tdlib.decompose(Aside(), small, stats).state_dict())[:2] == ["used.0.weight", "used.1.weight"]


def test_a_layer_named_in_full_must_be_reached():
    with pytest.raises(DataError, match="no statistics of direct"):
        statistics(Aside(), [torch.randn(20, 4)], ["used", "direct"])
    with pytest.raises(DataError, match="no statistics of auxiliary, direct"):
        statistics(Aside(), [torch.randn(20, 4)], "*[ic]*")


def calls(model, data):
    return {
        "statistics": lambda: statistics(model, data),
        "with weights": lambda: statistics(model, data, output_weights=True),
        "fisher": lambda: fisher(model, data, ["0"]),
        "recalibrate": lambda: recalibrate_batchnorm(model, data),
        "outputs": lambda: logits(model, data),
        "compress": lambda: tdlib.compress(model, "sequential", data, ratio=1.5),
    }


@pytest.mark.parametrize("name", calls(None, None))
def test_one_tensor_and_bytes_are_refused(name):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    with pytest.raises(DataError, match=r"one tensor of shape \(9, 8\): pass \[inputs\]"):
        calls(model, torch.randn(9, 8))[name]()
    with pytest.raises(DataError, match=r"uint8.*x / 255"):
        calls(model, [torch.zeros(9, 8, dtype=torch.uint8)])[name]()


def test_integers_are_inputs_of_embeddings():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    assert statistics(model, [torch.randint(0, 7, (30, 3))])["2"].shape == (12, 12)


def test_what_does_not_fit_is_refused_before_the_first_pass_and_named():
    model = nn.Sequential(nn.Conv2d(4, 40, 3), nn.ReLU(), nn.Conv2d(40, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    need = 8 * (36**2 + 360**2 + 8**2) + 2 * 8 * 360**2
    data = [torch.randn(2, 4, 5, 5)]
    for limit, weights in ((need - 1, False), (need, True), (0, False)):
        with pytest.raises(MemoryLimitError, match=r"largest: 2 .*`layers` of statistics, `skip`"):
            statistics(model, data, memory_limit=limit, output_weights=weights)
    with pytest.raises(MemoryLimitError, match="largest: 2 "):
        statistics(model, (pytest.fail("asked for inputs") for _ in "a"), memory_limit=0)


def test_memory_that_suffices_does(monkeypatch):
    model = nn.Sequential(nn.Linear(9, 4))
    assert len(statistics(model, [torch.randn(20, 9)], memory_limit=3 * 8 * 81)) == 1
    monkeypatch.setattr(memory, "free", lambda device: 3 * 8 * 81)
    with pytest.raises(MemoryLimitError, match="80 % of what is free"):
        statistics(model, [torch.randn(20, 9)])


@pytest.mark.parametrize("options", CONVS, ids=str)
def test_large_images_are_taken_a_few_rows_at_a_time(options, monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(5, 4, **options)), torch.randn(8, 5, 9, 8)
    whole = statistics(model, [x])
    added, add = [], Flat.add
    monkeypatch.setattr(Flat, "add", lambda self, rows, *a: added.append(rows.numel()) or add(self, rows, *a))
    monkeypatch.setattr(moments, "CHUNK", 1000)
    parts = statistics(model, [x])
    torch.testing.assert_close(parts["0"], whole["0"], atol=1e-6, rtol=1e-6)
    assert parts.counts == whole.counts
    width = model(x).shape[3] * model[0].weight[0].numel()
    assert max(added, default=0) <= max(1000, width)  # a row of one image is the least


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.LazyLinear(4)), "not initialised"),
        (nn.Linear(4, 4, device="meta"), "meta device"),
        (nn.Linear(4, 4, dtype=torch.cfloat), "no Linear or convolution"),
    ],
)
def test_networks_without_real_values_are_refused(model, words):
    with pytest.raises(TdlibError, match=words):
        tdlib.statistics(model, [torch.ones(2, 4)])


def test_outputs_that_are_no_class_scores_have_no_sensitivity():
    class Spectrum(nn.Linear):
        def forward(self, x):
            return torch.fft.fft(super().forward(x))

    with pytest.raises(DataError, match="class scores"):
        tdlib.statistics(Spectrum(4, 4), [torch.ones(8, 4)], output_weights=True)
