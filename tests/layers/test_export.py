"""All formats in one network: torch.export, torch.compile, ONNX and state_dict give the same outputs."""

import io
import warnings

import pytest
import torch
from torch import nn

from tdlib.layers import decompose, get_format, skeleton

#: Every module class and every kind of chain once.
CONV, POINT, LINEAR = (
    lambda: nn.Conv2d(6, 8, 3, (2, 1), 1),
    lambda: nn.Conv2d(6, 8, 1, (2, 1)),
    lambda: nn.Linear(6, 8),
)
BRANCHES = [
    (CONV, "tucker2", {}),
    (CONV, "cp4", {}),
    (CONV, "svd", {}),
    (CONV, "tt", {"order": 2}),
    (CONV, "tr", {}),
    (POINT, "svd", {}),
    (LINEAR, "svd", {}),
    (LINEAR, "tr", {}),
    (LINEAR, "tt-matrix", {}),
]


class Branches(nn.Module):
    """Layers beside each other on one image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(make() for make, _, _ in BRANCHES)

    def forward(self, x):
        flat = x.flatten(2).transpose(1, 2)
        maps = [
            layer(flat).mT if make is LINEAR else layer(x)
            for layer, (make, _, _) in zip(self.layers, BRANCHES, strict=True)
        ]
        return torch.stack([m.flatten(2).mean(2) for m in maps])


@pytest.fixture(scope="module")
def network():
    model = Branches().eval()
    rows = {}
    for k, (_, format, options) in enumerate(BRANCHES):
        ranks = [2] * len(get_format(format).bounds(model.layers[k].weight.shape, **options))
        rows[f"layers.{k}"] = {"format": format, "ranks": ranks, "options": options}
    return decompose(model, rows)


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 6, 7, 8, generator=torch.Generator().manual_seed(0))


def test_compile_without_graph_breaks(network, x):
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, at import of its compiler
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), network(x))


def test_export_with_a_free_batch_and_onnx(network, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},), strict=False)
        more = torch.cat([x, 2 * x, x])
        torch.testing.assert_close(program.module()(more), network(more))
        buffer = io.BytesIO()
        torch.onnx.export(program, dynamo=True, verbose=False).save(buffer)
        session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), network(more), rtol=1e-4, atol=1e-5)


def test_state_dict_round_trip(network, x):
    other = skeleton(Branches(), network._tdlib["layers"]).eval()
    assert not torch.allclose(other(x), network(x))
    other.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(other(x), network(x), rtol=0, atol=0)
