"""Ranks in multiples: the global rule is never worse than uniform ranks at the same budget."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images

import tdlib

SHAPE = (3, 32, 32)
ENDS = ("conv1", "linear")


@pytest.fixture(scope="module")
def network():
    """A trained ResNet-20, statistics with Fisher weights of crops of photographs, and other crops."""
    photos = torch.stack([torch.from_numpy(photo.copy()) for photo in load_sample_images().images])
    pixels = F.avg_pool2d(photos.permute(0, 3, 1, 2).float(), 2)  # (2, 3, 213, 320)
    pixels = (pixels - pixels.mean((0, 2, 3), True)) / pixels.std((0, 2, 3), keepdim=True)
    crops = pixels.unfold(2, 32, 24).unfold(3, 32, 24).permute(0, 2, 3, 1, 4, 5).reshape(-1, *SHAPE)
    model = tdlib.models.pretrained("resnet20-cifar100-reduced").eval()
    found = tdlib.statistics(model, crops[::2].split(50), output_weights=True)
    with torch.no_grad():
        return model, found, crops[1::2], model(crops[1::2]).log_softmax(1)


@pytest.mark.parametrize("multiple", [1, 8, 16])
@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0])
def test_the_global_rule_is_no_worse_than_uniform_ranks(network, ratio, multiple):
    """Kullback-Leibler divergence from the dense network's outputs, in nats a crop."""
    model, found, crops, dense = network

    def harm(**rule):
        plan = tdlib.plan(model, SHAPE, "tucker2", ratio, "params", ENDS, multiple=multiple, **rule)
        assert plan.ratio == pytest.approx(ratio, rel=0.02)
        for name, layer in plan.items():
            bounds = layer.bind(plan.costs[name].shape).bounds
            assert all(r % multiple == 0 or r == b for r, b in zip(layer.ranks, bounds, strict=True))
        with torch.no_grad():
            output = tdlib.decompose(model, plan)(crops).log_softmax(1)
        return float(F.kl_div(output, dense, log_target=True, reduction="batchmean"))

    assert harm(rule="global", statistics=found) <= harm()
