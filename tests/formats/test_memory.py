"""Rings in little memory: what composing holds at its peak, and a refusal where there is not enough."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdlib import memory
from tdlib.errors import MemoryLimitError
from tdlib.formats import LayerPlan, decompose, get_format, to_dense


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [
            t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if hasattr(t, "dtype")
        ]
        self.numbers = max([self.numbers, *sizes])
        return out


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shape", [(96, 392), (392, 96), (64, 48, 3, 3)])
def test_a_ring_is_composed_and_projected_in_the_cheap_order(shape, order):
    """Opened nowhere: (O·I·K + (O + I·K)·r²) numbers, where the open ring has r² times the kernel's."""
    bound = get_format("tr").bind(shape, order=order)
    layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], 3)
    module, rank = bound.random(layer, (33,) * len(bound.bounds)), 33  # no sweeps at such ranks
    rank = max(bound.clip((rank,) * len(bound.bounds)))
    with torch.no_grad(), Largest() as composing:
        to_dense(module)
    numbers = layer.weight.numel()
    sides = shape[0] + numbers // shape[0]
    assert composing.numbers <= 1.5 * (numbers + sides * rank**2)
    with Largest() as projecting:
        bound.project(layer.weight.detach(), (33,) * len(bound.bounds))
    assert projecting.numbers <= 3 * (numbers + sides * rank**2)


def test_the_ranks_of_a_ring_cannot_ask_for_more_than_there_is():
    layer = nn.Linear(8, 6)
    for format in ("tr", "shuffled-tr"):
        bound = get_format(format).bind((6, 8))
        for make in (bound.blank, bound.random):
            with pytest.raises(MemoryLimitError, match=f"format '{format}' at ranks .*lower the ranks"):
                make(layer, (10**9,) * len(bound.bounds))


def test_what_does_not_fit_is_refused_with_the_layer_and_the_way_out(monkeypatch):
    model = nn.Sequential(nn.Linear(6272, 1024, device="meta"))
    bound = get_format("tr").bind((1024, 6272))
    ranks = bound.clip((140, 140, 140, 140))
    monkeypatch.setattr(memory, "free", lambda device: 2**29)
    words = r"extents \(32, 32, 64, 98\).*ranks \(140, 140, 140, 140\).*GiB.*lower the ranks"
    with pytest.raises(MemoryLimitError, match=words):
        to_dense(bound.blank(model[0], ranks))
    model = model.to_empty(device="cpu").requires_grad_(False)
    model[0].weight.zero_()
    with pytest.raises(MemoryLimitError, match=r"layer '0': the tensor ring of extents .*fewer modes"):
        decompose(model, {"0": LayerPlan("tr", (32, 32, 32, 32))})
