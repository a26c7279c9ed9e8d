"""Forward time of compressed layers and networks, against dense and against tensorly-torch at equal ranks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import tdlib
from benchmarks.kernels import decaying_kernel, resnet
from benchmarks.timing import Row, measure
from tdlib.export import fold_batchnorm
from tdlib.formats import get_format

TOPIC = "latency"
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, height = width: the four stages of a ResNet
FORMATS = {"tucker2": 4, "tt": 4, "cp": 1}  # channels / rank
PEER = "tensorly-torch, factorized"
SHARE = 0.7  # a network's speed-up should be this part of its MACs ratio


def conv_layer(channels: int) -> nn.Conv2d:
    """A 3x3 convolution whose kernel has a decaying spectrum."""
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(decaying_kernel(channels, channels, seed=channels))
    return layer.eval()


def ours(layer: nn.Conv2d, name: str, rank: int) -> nn.Module:
    """tdlib's chain for one layer."""
    bound = get_format(name).bind(layer.weight.shape)
    ranks = (rank,) if name == "cp" else (rank, rank)
    return bound.module(layer, bound.decompose(layer.weight.detach(), ranks)).eval()


def peers(layer: nn.Conv2d, name: str, rank: int) -> nn.Module | None:
    """tensorly-torch's layer at the same ranks, in its fast mode; None where it is not installed.

    Its weights are left random: only its time is taken.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import tltorch
    except ImportError:
        return None
    kinds: dict[str, tuple[str, Any]] = {
        "tucker2": ("tucker", (rank, rank, 3, 3)),
        "tt": ("tt", (1, rank, rank, rank, 1)),
        "cp": ("cp", rank),
    }
    kind, ranks = kinds[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tltorch.FactorizedConv.from_conv(
            layer, rank=ranks, factorization=kind, implementation="factorized", decompose_weights=False
        ).eval()


def forward(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """One forward pass that is finished when it returns."""
    if x.is_cuda:

        def run() -> None:
            module(x)
            torch.cuda.synchronize()

        return run
    return lambda: module(x)


def layer_rows(quick: bool, device: str) -> Iterator[Row]:
    """Chains against the dense layer and tensorly-torch, batch 1 and 64, each in its faster memory format."""
    pairs, seconds = (5, 3.0) if quick else (21, 8.0)
    for channels, side in LAYERS[:2] if quick else LAYERS:
        dense = conv_layer(channels)
        for batch in (1, 8) if quick else (1, 64):
            x = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0)).to(
                device
            )
            for name, part in FORMATS.items():
                rank = channels // part
                small = ours(dense, name, rank).to(device)
                macs = _macs(dense, (channels, side, side)) / _macs(small, (channels, side, side))
                label = f"{name}, {channels} channels at {side}x{side}, rank {rank}, batch {batch}"
                a, _ = _faster(small, x)
                row = Row(TOPIC, label, "tdlib", "dense layer", extra={"macs_ratio": macs})
                row.note = f"{macs:.2f}x fewer MACs"
                b, _ = _faster(copy.deepcopy(dense).to(device), x)
                yield measure(row, a, b, pairs=pairs, seconds=seconds, device=device)
                other = peers(dense, name, rank)
                row = Row(TOPIC, label, "tdlib", PEER, target=1.0)
                if other is None:
                    row.note = "peer not installed"
                    yield row
                else:
                    b, _ = _faster(other.to(device), x)
                    yield measure(row, a, b, pairs=pairs, seconds=seconds, device=device)


def network_rows(quick: bool, device: str) -> Iterator[Row]:
    """Whole ResNet-18 at 3x fewer MACs against dense, both as one would use them: BatchNorm folded into the
    convolutions, in their faster memory format; ranks are multiples of 16 channels."""
    side, pairs, seconds = (96, 3, 10.0) if quick else (224, 9, 60.0)
    shape = (3, side, side)
    dense, source = resnet("resnet18")
    for name, batch in (("tucker2", 1), ("tucker2", 16), ("tt", 16), ("tucker2", 64)):
        if quick and batch != 16:
            continue
        plan = tdlib.plan(dense, shape, format=name, ratio=3.0, by="macs", skip=("conv1", "fc"), multiple=16)
        small = tdlib.decompose(dense, plan).eval()
        ratio = tdlib.count(dense, shape).macs / tdlib.count(small, shape).macs
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        a, form_a = _faster(fold_batchnorm(small).to(device), x)
        b, form_b = _faster(fold_batchnorm(dense).to(device), x)
        row = Row(
            TOPIC,
            f"{name}, resnet18 at {side}x{side}, batch {batch}, {ratio:.2f}x MACs",
            "tdlib",
            "dense network",
        )
        row.note = f"{source}; memory format {form_a} / {form_b}"
        row.extra = {"macs_ratio": ratio}
        if batch == 16:
            row.target = SHARE * ratio
        yield measure(row, a, b, pairs=pairs, seconds=seconds, device=device)


def _faster(module: nn.Module, x: Tensor) -> tuple[Callable[[], Any], str]:
    """The pass in the memory format that is faster for this module, by a short interleaved measurement."""
    plain = forward(module, x)
    last = forward(
        copy.deepcopy(module).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    )
    row = measure(Row("", "", "", ""), plain, last, pairs=3, seconds=5.0, device=str(x.device))
    return (plain, "contiguous") if row.ratio >= 1 else (last, "channels_last")


def _macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    return tdlib.count(module.cpu(), shape).macs


@torch.inference_mode()
def rows(quick: bool, device: str) -> Iterator[Row]:
    """All rows of this topic."""
    yield from layer_rows(quick, device)
    yield from network_rows(quick, device)
