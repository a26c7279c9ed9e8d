"""All formats in one network: torch.export, torch.compile, ONNX, state and files give the same outputs."""

import copy
import io
import warnings

import pytest
import torch
from format_cases import KINDS, make_layer, middle
from torch import nn

import tdlib
from tdlib.formats import LayerPlan, decompose, get_format, skeleton


class Branches(nn.Module):
    """Every kind of module beside each other on one image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(make_layer(name).float() for name, _, _ in KINDS)

    def forward(self, x):
        flat = x.flatten(2).transpose(1, 2)
        inputs = {"linear": flat, "1-D": flat.mT, "3-D": x[:, :, :5, None] * torch.ones(4, 1)}
        maps = [
            layer(inputs.get(name, x)).mT if name == "linear" else layer(inputs.get(name, x))
            for layer, (name, _, _) in zip(self.layers, KINDS, strict=True)
        ]
        return torch.stack([m.flatten(2).mean(2) for m in maps])


@pytest.fixture(scope="module")
def network():
    model, plan = Branches().eval(), {}
    for k, (_, format, options) in enumerate(KINDS):
        bound = get_format(format).bind(model.layers[k].weight.shape, **options)
        plan[f"layers.{k}"] = LayerPlan(format, middle(bound), options)
    return decompose(model, plan)


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


def test_state_dict_files_and_copies(network, x, tmp_path):
    other = skeleton(Branches(), tdlib.provenance(network).layers).eval()
    assert not torch.allclose(other(x), network(x))
    other.load_state_dict(network.state_dict(), strict=True)
    tdlib.save(network, tmp_path / "all.safetensors")
    for again in (other, copy.deepcopy(network), tdlib.load(tmp_path / "all.safetensors", Branches())):
        assert torch.equal(again(x), network(x))
        assert tdlib.provenance(again).layers == tdlib.provenance(network).layers
