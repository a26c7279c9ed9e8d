"""How many threads work is given: one where there is too little of it to share."""

import pytest
import torch
from torch import nn

import tdlib
from tdlib.calibration import fisher, logits, paired, recalibrate_batchnorm, statistics
from tdlib.calibration.passes import threads_for
from tdlib.decompositions.linalg import full_precision, one_thread, small
from tdlib.train import evaluate


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2  # whatever was called restored them
    torch.set_num_threads(before)


class Watching(nn.Module):
    """A network that notes with how many threads it runs."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.seen = []

    def forward(self, x):
        self.seen.append(torch.get_num_threads())
        return self.last(self.norm(self.layer(x)))


def test_threads_come_back_also_after_an_error_and_from_inside_another():
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        with one_thread():
            pass
        assert torch.get_num_threads() == 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == 2
    with one_thread(when=False):
        assert torch.get_num_threads() == 2


def test_small_factorisations_take_one_thread_and_large_ones_all():
    @full_precision
    def threads(*tensors, **named):
        return torch.get_num_threads()

    assert threads(torch.empty(64, 64, 3, 3), [3, 4], S=torch.empty(576, 576)) == 1
    assert threads(torch.empty(256, 256, 3, 3)) == 2
    assert threads(torch.empty(64, 512, 3, 3), S=torch.empty(4608, 4608)) == 2
    assert small(torch.empty(2047, 2047)) and not small(torch.empty(2, 2048)) and small(torch.tensor(1.0))


def test_passes_of_small_networks_take_one_thread():
    model, x = Watching(), torch.randn(40, 4)
    statistics(model, [x], output_weights=True)
    fisher(model, [x], ["last"])
    paired(model, model, "last", [x])
    logits(model, [x])
    recalibrate_batchnorm(model, [x])
    assert len(model.seen) == 7 and set(model.seen) == {1}
    with threads_for(model, 10**9):
        assert torch.get_num_threads() == 2


def test_the_default_method_takes_one_thread_on_a_small_network(monkeypatch):
    seen = []
    for name in ("eigh", "eigvalsh", "cholesky", "solve", "qr"):
        plain = getattr(torch.linalg, name)

        def watched(*args, plain=plain, **kwargs):
            seen.append(torch.get_num_threads())
            return plain(*args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, watched)
    data = tdlib.data.load("digits", limit=100)
    model = tdlib.models.build("cnn", 10, input_shape=(1, 8, 8), width=4)
    forwards = []
    hook = model.conv2.register_forward_hook(lambda *_: forwards.append(torch.get_num_threads()))
    evaluate(model, data)
    hook.remove()
    assert forwards == [1]
    tdlib.compress(model, "sequential", data, ratio=1.5, progress=False)
    assert len(seen) > 20 and set(seen) == {1}
