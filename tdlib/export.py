"""A network for use: BatchNorm folded away, or as ONNX, checked before the file is written."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._pytree import keystr, tree_flatten_with_path

from tdlib.errors import TdlibError
from tdlib.files import write_atomic
from tdlib.formats.replace import attached, obstacle
from tdlib.network import check_layered, duplicate

TOLERANCE = 1e-3
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
Inputs = tuple[Tensor, ...]


def to_onnx(
    model: nn.Module,
    path: str | Path,
    input_shape: Sequence[int] | None = None,
    *,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    opset: int = 18,
) -> float:
    """Export ``model`` (batch size free, weights inside the one file); the model is left as it was.

    input_shape: one input without batch; or else example_inputs: what the model is called with, one tensor or
    several, of any type, each with the batch first. Outputs may be a tensor ("output") or tensors in a dict
    or tuple, which name them ("aux", "output_1"). onnxruntime runs the file on batches of 1 and 3.
    Returns the largest difference from PyTorch's outputs, relative to their size (nan without onnxruntime).
    Raises TdlibError where packages are missing, the export fails, outputs differ or are not finite;
    FileError where the file cannot be written. No file is left then.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise TdlibError("ONNX export needs more packages: pip install 'tdlib[onnx]'") from error
    check_layered(model)
    inputs_of = _inputs(input_shape, example_inputs)
    network = duplicate(model).cpu().float().eval()
    names = list(_run(network, inputs_of(2)))
    data = _export(network, inputs_of(2), names, opset)
    difference = _difference(network, data, names, inputs_of)
    write_atomic(path, data)
    return difference


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy for inference in which every BatchNorm that follows a convolution or a linear layer is part of
    that layer's weights: the same outputs, and one pass over memory less for each. It no longer trains.

    A chain of convolutions (Tucker-2, TT, CP, SVD) takes the norm into its last one. A norm stays after
    anything else, after a layer that is used twice or whose weight is read elsewhere, where hooks are
    attached to one of them, and, since what BatchNorm1d takes for channels depends on the axes of its input,
    after a Conv1d or a linear layer whose input was not flattened in sight. Raises TdlibError for a network
    whose forward torch.fx cannot trace, or that has hooks or a patched forward itself.
    """
    if reason := attached(model):
        raise TdlibError(f"BatchNorm cannot be folded, the network would lose something: {reason}")
    network = duplicate(model).eval()
    try:
        traced = fx.GraphModule(network, _Tracer().trace(network))
    except Exception as error:  # tracing runs the model's own code
        raise TdlibError(f"BatchNorm cannot be folded, the forward is not traceable: {error}") from error
    for node in list(traced.graph.nodes):
        norm = _called(node)
        if not isinstance(norm, BatchNorm) or norm.running_mean is None:
            continue
        before = node.all_input_nodes[0]
        layer = _called(before)
        if not _alone(before) or not _alone(node) or len(before.users) > 1 or attached(norm):
            continue
        if not isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear) or obstacle(layer):
            continue
        if (isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)) or (
            isinstance(layer, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d)
        ):
            traced.set_submodule(str(before.target), fuse_conv_bn_eval(layer, norm))
        elif isinstance(layer, nn.Linear) and _is_matrix(before):
            traced.set_submodule(str(before.target), fuse_linear_bn_eval(layer, norm))
        else:
            continue
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
        traced.delete_submodule(str(node.target))
    traced.graph.lint()
    traced.recompile()
    return traced


def _called(node: fx.Node) -> Any:
    """The module that the node calls, or None."""
    owner: Any = node.graph.owning_module
    return owner.get_submodule(node.target) if node.op == "call_module" else None


def _alone(node: fx.Node) -> bool:
    """Whether nothing else in the graph calls the node's module or reads its parameters."""
    name = str(node.target)
    return not any(
        other.target == name or (other.op == "get_attr" and str(other.target).startswith(f"{name}."))
        for other in node.graph.nodes
        if other is not node
    )


def _is_matrix(node: fx.Node) -> bool:
    """Whether the value is certainly of shape (N, C): flattened, perhaps some layers before."""
    module = _called(node)
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    if module is None:
        given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        flattens = node.target in (torch.flatten, "flatten")
        return flattens and {"end_dim": -1} | given == {"start_dim": 1, "end_dim": -1}
    keeps = ("activation", "batchnorm", "dropout", "linear")
    if type(module).__module__ not in {f"torch.nn.modules.{kind}" for kind in keeps}:
        return False
    return _is_matrix(node.all_input_nodes[0])


class _Tracer(fx.Tracer):
    """Looks into chains of layers, not into layers that contract their factors themselves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        contracts = hasattr(m, "kernel") and not isinstance(m, nn.Sequential)
        return contracts or super().is_leaf_module(m, module_qualified_name)


def _inputs(
    input_shape: Sequence[int] | None, example: Tensor | Sequence[Tensor] | None
) -> Callable[[int], Inputs]:
    """Batch size -> inputs of that size: random ones, or the example's rows in turn."""
    if (input_shape is None) == (example is None):
        raise TdlibError("give either the input_shape of one input or example_inputs")
    if input_shape is not None:
        shape = tuple(input_shape)
        return lambda n: (torch.randn(n, *shape, generator=torch.Generator().manual_seed(n)),)
    given = (example,) if isinstance(example, Tensor) else tuple(example or ())
    if not given or not all(isinstance(x, Tensor) and x.ndim and len(x) == len(given[0]) > 0 for x in given):
        raise TdlibError("example_inputs are tensors with the batch first, of one size")
    ready = [x.detach().cpu().float() if x.is_floating_point() else x.detach().cpu() for x in given]
    return lambda n: tuple(x[torch.arange(n) % len(x)] for x in ready)


def _run(network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Name -> output tensor. Raises TdlibError for what ONNX cannot hold or nobody could compare."""
    try:
        with torch.inference_mode():
            leaves, _ = tree_flatten_with_path(network(*inputs))
    except Exception as error:  # the model's own code
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise TdlibError(f"the model does not run on inputs of shape {shapes}: {_root(error)}") from error
    found = {}
    for path, value in leaves:
        keys = re.findall(r"\w+", keystr(path))
        name = "_".join(keys if keys and keys[0].isidentifier() else ["output", *keys])
        if value is None:
            continue  # ONNX leaves it out
        if not isinstance(value, Tensor):
            raise TdlibError(f"ONNX has tensors only: output {name!r} is a {type(value).__name__}")
        if not bool(value.isfinite().all()):
            raise TdlibError(f"NaN or Inf in the model's output {name!r}: nothing to compare with")
        found[name] = value
    return found


def _export(network: nn.Module, inputs: Inputs, names: Sequence[str], opset: int) -> memoryview:
    """The ONNX file's content."""
    batch = torch.export.Dim("batch", min=1, max=2**16)
    numbered = [f"input_{k}" for k in range(len(inputs))] if len(inputs) > 1 else ["input"]
    buffer = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        try:
            program: Any = torch.onnx.export(
                network, inputs, dynamo=True, opset_version=opset, verbose=False,
                input_names=numbered, output_names=names, dynamic_shapes=tuple({0: batch} for _ in inputs),
            )  # fmt: skip
            program.save(buffer)
        except Exception as error:  # the exporter raises many kinds
            raise TdlibError(f"ONNX export failed: {_root(error)}") from error
    return buffer.getbuffer()


def _root(error: BaseException) -> str:
    """The first line of the error that caused all others, without colours."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: " + re.sub(r"\x1b\[[0-9;]*m", "", line)


def _difference(
    network: nn.Module, data: memoryview, names: Sequence[str], inputs_of: Callable[[int], Inputs]
) -> float:
    """The largest relative difference over all outputs and batches of 1 and 3. Raises TdlibError."""
    try:
        import onnxruntime
    except ImportError:
        return float("nan")
    session = onnxruntime.InferenceSession(bytes(data), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (1, 3):
        inputs = inputs_of(batch)
        feed = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
        for (name, expected), value in zip(
            _run(network, inputs).items(), session.run(list(names), feed), strict=True
        ):
            found, expected = torch.from_numpy(value).double(), expected.double()
            if found.shape != expected.shape:
                raise TdlibError(
                    f"the ONNX file computes something else: {name!r} has shape {tuple(found.shape)}, "
                    f"PyTorch's {tuple(expected.shape)}"
                )
            if not bool(found.isfinite().all()):
                raise TdlibError(f"the ONNX file computes something else: NaN or Inf in {name!r}")
            if expected.numel():
                size = expected.abs().max().clamp_min(1e-12)
                worst = max(worst, float((found - expected).abs().max() / size))
    if worst > TOLERANCE:
        raise TdlibError(f"the ONNX file computes something else: relative difference {worst:.1e}")
    return worst
