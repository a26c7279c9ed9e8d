"""A network for use: BatchNorm folded away, or as ONNX, checked before the file gets its name."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from tdlib.errors import TdlibError

TOLERANCE = 1e-3


def to_onnx(model: nn.Module, path: str | Path, input_shape: Sequence[int], *, opset: int = 18) -> float:
    """Export ``model`` (batch size free, weights inside the one file); the model is left as it was.

    input_shape: one input without batch. The file is run by onnxruntime on random batches of 1 and 3 inputs.
    Returns the largest difference from PyTorch's outputs, relative to their size (nan without onnxruntime).
    Raises TdlibError where packages are missing, the export fails or outputs differ; no file is left then.
    """
    path = Path(path)
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise TdlibError(
            "ONNX export needs more packages: pip install 'tdlib[onnx]'"
        ) from error
    network = _inference_copy(model)
    example = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    handle, draft = tempfile.mkstemp(suffix=".onnx", prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        _export(network, example, draft, opset)
        difference = _difference(network, draft, input_shape)
        if difference > TOLERANCE:
            raise TdlibError(f"the ONNX file computes something else: relative difference {difference:.1e}")
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
    return difference


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy for inference in which every BatchNorm that follows a convolution or a linear layer is part of
    that layer's weights: the same outputs, and one pass over memory less for each. It no longer trains.

    A chain of convolutions (Tucker-2, TT, CP, SVD) takes the norm into its last one. A norm after anything
    else, or after a layer that is used twice, stays. Raises TdlibError for a network whose forward torch.fx
    cannot trace.
    """
    network = copy.deepcopy(model).eval()
    try:
        traced = fx.GraphModule(network, _Tracer().trace(network))
    except Exception as error:  # tracing runs the model's own code
        raise TdlibError(f"BatchNorm cannot be folded, the forward is not traceable: {error}") from error
    modules = dict(traced.named_modules())
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    for node in list(traced.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_mean is None:
            continue
        before = node.args[0]
        layer = modules.get(str(before.target)) if before.op == "call_module" else None
        if len(before.users) > 1 or calls.count(before.target) > 1 or calls.count(node.target) > 1:
            continue
        if layer is not None and parametrize.is_parametrized(layer):
            continue  # its weight is composed in every pass
        if isinstance(layer, nn.Conv2d):
            traced.set_submodule(str(before.target), fuse_conv_bn_eval(layer, norm))
        elif isinstance(layer, nn.Linear):
            traced.set_submodule(str(before.target), fuse_linear_bn_eval(layer, norm))
        else:
            continue
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
        traced.delete_submodule(str(node.target))
    traced.graph.lint()
    traced.recompile()
    return traced


class _Tracer(fx.Tracer):
    """Looks into chains of layers, not into layers that contract their factors themselves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        contracts = hasattr(m, "kernel") and not isinstance(m, nn.Sequential)
        return contracts or super().is_leaf_module(m, module_qualified_name)


def _inference_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cpu().float().eval()


def _export(network: nn.Module, example: torch.Tensor, path: str, opset: int) -> None:
    batch = torch.export.Dim("batch", min=1, max=2**16)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        try:
            torch.onnx.export(
                network, (example,), path, dynamo=True, opset_version=opset, external_data=False,
                verbose=False, input_names=["input"], output_names=["output"], dynamic_shapes=({0: batch},),
            )  # fmt: skip
        except Exception as error:  # the exporter raises many kinds
            raise TdlibError(f"ONNX export failed: {str(error).splitlines()[0]}") from error


def _difference(network: nn.Module, path: str, input_shape: Sequence[int]) -> float:
    try:
        import onnxruntime
    except ImportError:
        return float("nan")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (1, 3):
        x = torch.randn(batch, *input_shape, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            expected = network(x)
        found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)))
    return worst
