"""Training: ADMM's extra time per epoch, and the training step against the ordinary loop."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

import tdlib
from benchmarks.timing import Row, clock, fill, invert
from benchmarks.tuning import tune_cpu
from tdlib.data import ArraySplit, Augment, Bundle
from tdlib.methods.admm import ADMM

TOPIC = "training"
EPOCH_STEPS = 391  # CIFAR: 50,000 images in batches of 128
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def images(number: int, side: int = 32) -> Bundle:
    """Random colour images of ten classes (side 32: the shape of CIFAR-10)."""
    generator = torch.Generator().manual_seed(0)
    splits = []
    for n in (number, 16, 16):
        pixels = torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=generator)
        splits.append(ArraySplit(pixels, torch.arange(n) % 10, MEAN, STD))
    return Bundle(
        "random",
        [str(i) for i in range(10)],
        MEAN,
        STD,
        (3, side, side),
        *splits,
        augment=Augment(pad=4, flip=True),
    )


class Clock(tdlib.train.Hook):
    """Times of the ends of steps, without the first ones (warm-up, compilation, starting workers)."""

    def __init__(self, skip: int, device: str) -> None:
        self.skip, self.cuda, self.now = skip, device.startswith("cuda"), clock(device)
        self.ends: list[float] = []

    def after_step(self, ctx: Any) -> None:
        last = ctx.step + 1 >= ctx.steps
        if self.cuda and not (last or len(self.ends) == self.skip):
            self.ends.append(float("nan"))  # no synchronisation inside the epoch
            return
        if self.cuda:
            torch.cuda.synchronize()
        self.ends.append(self.now())

    def per_step(self) -> float:
        """Mean seconds of a step after the first ``skip``."""
        return (self.ends[-1] - self.ends[self.skip]) / (len(self.ends) - 1 - self.skip)


def fresh(network: str = "resnet20") -> nn.Module:
    """An untrained network for ten classes."""
    torch.manual_seed(0)
    return tdlib.models.build(network, 10)


def library_step(
    data: Bundle,
    batch: int,
    device: str,
    hooks: tuple[Any, ...] = (),
    network: str = "resnet20",
    **options: Any,
) -> float:
    """Seconds per step of ``train.fit`` over one epoch of ``data``."""
    clock = Clock(2, device)
    tdlib.train.fit(
        fresh(network), data, epochs=1, batch_size=batch, hooks=(*hooks, clock), device=device,
        progress=False, validate=False, **options,
    )  # fmt: skip
    return clock.per_step()


def plain_step(data: Bundle, batch: int, device: str, workers: int, network: str = "resnet20") -> float:
    """Seconds per step of the ordinary loop: torchvision transforms, DataLoader, eager float32."""
    pipeline = transforms.Compose([
        transforms.ToPILImage(), transforms.RandomCrop(data.input_shape[1], 4),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD),
    ])  # fmt: skip

    class Images(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(data.train)

        def __getitem__(self, i: int) -> Any:
            return pipeline(data.train.images[i].permute(2, 0, 1)), int(data.train.labels[i])

    loader = DataLoader(Images(), batch, shuffle=True, num_workers=workers, drop_last=True)
    model = fresh(network).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    now, ends, total = clock(device), [], 0.0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        ends.append(now())
    return (ends[-1] - ends[2]) / (len(ends) - 3)


def alternate(row: Row, a: Callable[[], float], b: Callable[[], float], pairs: int) -> Row:
    """Fill ``row`` from runs that time themselves, alternately."""
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            times[which].append((a, b)[which]())
    return fill(row, *times)


def admm_rows(quick: bool, device: str) -> Iterator[Row]:
    """ADMM's epoch against a plain epoch of ResNet-20, for three formats."""
    batch, steps, pairs = (32, 6, 2) if quick else (128, 9, 5)
    if device.startswith("cuda"):
        steps, pairs = EPOCH_STEPS, 5
    data = images(batch * steps)
    plan_model = fresh()
    for format in ("tt", "tucker2", "tr"):
        plan = tdlib.plan(plan_model, (3, 32, 32), format=format, ratio=2.4, skip=("conv1", "linear"))
        projections: list[float] = []

        def epoch(plan: Any = plan, projections: list[float] = projections) -> float:
            hook = ADMM(plan, rho=1e-3)
            step = library_step(data, batch, device, (hook,))
            now = clock(device)
            started = now()
            hook.update()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            projections.append(now() - started)
            return step * EPOCH_STEPS + projections[-1]

        row = Row(
            TOPIC,
            f"ADMM ({format}, 2.4x) epoch of resnet20, {EPOCH_STEPS} steps of {batch}",
            "ADMM",
            "plain epoch",
        )
        row.target, row.at_most = 1.05, True
        alternate(row, epoch, lambda: library_step(data, batch, device) * EPOCH_STEPS, pairs)
        invert(row)
        share = statistics.median(projections) * 1e3 / row.b_ms
        row.extra = {"projection_share_percent": 100 * share}
        row.note = (
            f"ratio: ADMM's epoch / plain epoch, from {steps} measured steps of each and one "
            f"measured projection of all layers, which takes {100 * share:.2f} % of the epoch"
        )
        yield row


def step_rows(quick: bool, device: str) -> Iterator[Row]:
    """``fit`` against the ordinary loop: ResNet-20 on images of CIFAR's size, ResNet-18 of ImageNet's."""
    cuda = device.startswith("cuda")
    workers = 8 if cuda else min(2, os.cpu_count() or 1)
    for network, side in (("resnet20", 32), ("resnet18", 64 if quick else 224)):
        small = network == "resnet20"
        batch, steps, pairs = (32, 6, 2) if quick else (128, 9, 5) if small else (16, 6, 3)
        if cuda:
            batch, steps, pairs = (128, EPOCH_STEPS, 3) if small else (256, 40, 3)
        data = images(batch * steps, side)
        row = Row(
            TOPIC,
            f"training step of {network} at {side}x{side}, batch {batch}, {device}",
            "tdlib.train.fit",
            "DataLoader loop, eager",
        )
        row.note = f"the ordinary loop has {workers} workers, whose CPU time is not counted"
        if cuda:
            options: dict[str, Any] = {"precision": "bf16", "compile": True}
        else:
            threads = torch.get_num_threads()
            found = tune_cpu(fresh(network), data, batch_size=batch, threads=(threads,), rounds=2)
            options = {k: v for k, v in found.options.items() if k != "device"}
            row.note += f"; tune_cpu chose {found.best}, {found.rows[0]['speed-up']:.2f}x the plain setting"
        row.target = (10.0 if cuda else 1.0) if small else None
        alternate(
            row,
            lambda data=data, batch=batch, options=options, network=network: library_step(
                data, batch, device, network=network, **options
            ),
            lambda data=data, batch=batch, network=network: plain_step(data, batch, device, workers, network),
            pairs,
        )
        row.extra = {"images_per_second": 1e3 * batch / row.a_ms}
        yield row


def rows(quick: bool, device: str) -> Iterator[Row]:
    """All rows of this topic."""
    yield from admm_rows(quick, device)
    yield from step_rows(quick, device)
