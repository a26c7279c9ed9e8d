"""Streamed input statistics against im2col of everything."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tdlib
from tdlib.calibration import shrinkage_for
from tdlib.errors import CheckpointError, DataError, NonFiniteError
from tdlib.moments import padded
from tdlib.sensitivity import damped, divergence, fisher, paired

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
    stats = tdlib.statistics(model, [x[:4], (x[4:], torch.zeros(3))])
    X = im2col(model[0], x)
    assert stats.counts["0"] == len(X) == model(x)[:, 0].numel()
    torch.testing.assert_close(stats["0"], X.T @ X / len(X), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(stats.means["0"], X.mean(0), atol=1e-6, rtol=1e-6)
    W = model[0].weight.detach().double().flatten(1)
    output = model(x).detach().double().square().mean((0, 2, 3)).sum()
    assert float(torch.trace(W @ stats["0"] @ W.T)) == pytest.approx(float(output), rel=1e-5)


def test_images_of_several_sizes_and_batches_of_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    batches = [torch.randn(1, 3, 6, 5), torch.randn(2, 3, 9, 4)]
    X = torch.cat([im2col(model[2], model[:2](x).detach()) for x in batches])
    torch.testing.assert_close(tdlib.statistics(model, batches)["2"], X.T @ X / len(X), atol=1e-6, rtol=1e-6)


def test_linear_layers_flatten_positions_and_grouped_ones_are_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(40, 3, 6)
    stats = tdlib.statistics(model, [x])
    h = model[:2](x).detach().double().reshape(-1, 5)
    torch.testing.assert_close(stats["2"], h.T @ h / 120, atol=1e-6, rtol=1e-6)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    assert list(tdlib.statistics(grouped, [torch.randn(9, 4, 5, 5)])) == ["1"]


def test_the_model_is_left_as_it_was_and_norms_run_in_evaluation_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    model.train()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    stats = tdlib.statistics(model, [torch.randn(8, 3, 9, 9)], layers=["2"])
    assert list(stats) == ["2"] and model.training and not model[0].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[2]._forward_pre_hooks


def test_sampled_positions_approach_the_exact_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    x = [torch.randn(50, 4, 12, 12).relu() for _ in range(4)]
    exact = tdlib.statistics(model, x)["0"]
    errors = []
    for positions in (2, 16, 144):
        sampled = tdlib.statistics(model, x, positions=positions, seed=1)
        assert sampled.counts["0"] == 200 * positions
        errors.append(float((sampled["0"] - exact).norm() / exact.norm()))
        again = tdlib.statistics(model, x, positions=positions, seed=1)
        assert torch.equal(again["0"], sampled["0"])
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-6


def test_too_few_patches_warn_with_the_numbers_and_are_regularised():
    model = nn.Sequential(nn.Conv2d(8, 2, 3))
    with pytest.warns(UserWarning, match="72 x 72 .* only 9 patches"):
        sigma = tdlib.statistics(model, [torch.randn(1, 8, 5, 5)])["0"]
    assert torch.linalg.eigvalsh(sigma)[0] > 0
    assert shrinkage_for("x", 10, 10) == 0


def test_bad_calibration_data_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(DataError, match="empty"):
        tdlib.statistics(model, [])
    with pytest.raises(DataError, match="no Conv2d"):
        tdlib.statistics(model, [torch.randn(9, 3)], layers=["conv*"])
    with pytest.raises(DataError, match="must be tensors"):
        tdlib.statistics(model, ["a"])
    with pytest.raises(NonFiniteError, match="'0'"):
        tdlib.statistics(model, [torch.full((9, 3), float("nan"))])
    with torch.no_grad():
        model[0].bias[0] = float("inf")
    with pytest.raises(NonFiniteError, match="'1'"):
        tdlib.statistics(model, [torch.randn(9, 3)])


def test_saved_statistics_come_back_and_foreign_files_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))
    stats = tdlib.statistics(model, [torch.randn(60, 2, 5, 5)])
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    back = tdlib.load_statistics(path)
    assert list(back) == list(stats) and back.counts == stats.counts
    assert all(torch.equal(back[n], stats[n]) and torch.equal(back.means[n], stats.means[n]) for n in stats)
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]
    with pytest.raises(DataError, match="no statistics for layer 'x'"):
        stats["x"]
    with pytest.raises(CheckpointError):
        tdlib.load_statistics(tmp_path / "missing.safetensors")
    path.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError):
        tdlib.load_statistics(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="was not written"):
        tdlib.load_statistics(path)


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


def test_the_fisher_weight_predicts_the_divergence_of_small_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(4000, 6)
    H = fisher(model, [x], ["0"])["0"]
    sigma = tdlib.statistics(model, [x], ["0"])["0"]
    changed = copy.deepcopy(model)
    D = 0.02 * torch.randn(8, 6)
    with torch.no_grad():
        changed[0].weight.add_(D)
        found = divergence(model(x), changed(x))
    D = D.double()
    predicted = 0.5 * float(torch.einsum("op,oi,ij,pj->", H, D, sigma, D))
    assert found == pytest.approx(predicted, rel=0.5)  # H and Sigma are taken as independent
    assert torch.linalg.eigvalsh(damped(torch.zeros(3, 3)))[0] == 1


def test_batchnorm_recalibration_takes_the_statistics_of_the_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
    x = torch.randn(64, 2, 4, 4) * 3 + 1
    tdlib.recalibrate_batchnorm(model, x.split(16))
    y = model[0](x).detach()
    torch.testing.assert_close(model[1].running_mean, y.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
    assert model[1].momentum == 0.1 and not model[1].training
    with pytest.raises(DataError):
        tdlib.recalibrate_batchnorm(nn.Linear(2, 2), [torch.zeros(1, 2)])
    with pytest.raises(DataError, match="empty"):
        tdlib.recalibrate_batchnorm(model, [])


@pytest.mark.parametrize("bias", [True, False])
def test_bias_correction_restores_the_mean_output_without_new_parameters(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.ReLU()).eval()
    x = torch.rand(50, 3, 6, 6)
    stats = tdlib.statistics(model, [x])
    small = tdlib.decompose(
        model, {"0": {"format": "tucker2", "ranks": (2, 2), "options": {}}}, statistics=stats
    )
    size = sum(p.numel() for p in small.parameters())
    assert tdlib.correct_bias(small, model, stats, ["0"], x) == ["0"]
    assert sum(p.numel() for p in small.parameters()) == size
    means = [m[:2](x).mean((0, 2, 3)).detach() for m in (model, small)]
    torch.testing.assert_close(means[1], means[0], atol=1e-4, rtol=1e-4)
    bare = nn.Sequential(nn.Linear(3, 2, bias=False))
    stats = tdlib.statistics(bare, [torch.rand(9, 3)])
    assert tdlib.correct_bias(copy.deepcopy(bare), bare, stats, ["0"], torch.rand(1, 3)) == []
