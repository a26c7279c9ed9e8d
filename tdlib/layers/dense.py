"""The dense kernel of any layer, factorised or not."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor, nn

from tdlib.errors import TdlibError
from tdlib.layers.ring import RingConv2d, RingLinear
from tdlib.layers.shuffled import ShuffledConv2d, ShuffledLinear
from tdlib.layers.ttmatrix import TTMatrixLinear


def to_dense(module: nn.Module) -> Tensor:
    """The kernel (O, I, kh, kw) or matrix (O, I) that the module applies; differentiable, bias left out.

    For nn.Conv2d, nn.Linear, the layers of this package, and nn.Sequential chains of them as `decompose`
    builds them (at most one member with extent along each axis, depthwise members after a full one).
    Raises: TdlibError for anything else.
    """
    if isinstance(module, RingConv2d):
        return _ring_kernel(module)
    if isinstance(module, RingLinear):
        tensor = _close(_train([*module.out_cores, *module.in_cores]))
        outputs = math.prod(core.shape[1] for core in module.out_cores)
        return tensor.reshape(outputs, -1)
    if isinstance(module, TTMatrixLinear):
        return _tt_matrix(module)
    if isinstance(module, (ShuffledConv2d, ShuffledLinear)):
        return module.kernel()
    if isinstance(module, nn.Sequential) and len(module):
        return reduce(_after, module, None)  # type: ignore[return-value]
    if isinstance(module, nn.Linear):
        return module.weight
    if isinstance(module, nn.Conv2d) and not module.transposed:
        if module.groups != 1:
            raise TdlibError(
                f"a grouped convolution ({module.groups} groups) has no single dense kernel here"
            )
        return module.weight
    raise TdlibError(f"{type(module).__name__} is no layer with a dense kernel")


def _after(first: Tensor | None, module: nn.Module) -> Tensor:
    """The kernel of `module` applied after the kernel `first` (r, I, a, b) or (r, I)."""
    if first is None:
        return to_dense(module)
    if first.ndim == 2:
        return to_dense(module) @ first
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        if not module.groups == module.in_channels == module.out_channels:
            raise TdlibError("a grouped member of a chain must be depthwise")
        second, equation = module.weight[:, 0], "rcd,riab->riacbd"
    else:
        second, equation = to_dense(module), "orcd,riab->oiacbd"
    extents = [(first.shape[axis], second.shape[axis]) for axis in (-2, -1)]
    if any(a > 1 and b > 1 for a, b in extents):
        raise TdlibError(
            "two members of the chain extend along the same axis: not a chain that decompose builds"
        )
    product = torch.einsum(equation, second, first)
    return product.reshape(*product.shape[:2], *(a * b for a, b in extents))


def _train(cores: list[Tensor]) -> Tensor:
    """Contract cores (r_k, n_k, r_{k+1}) to (r_0, n_0, ..., n_{d-1}, r_d)."""
    return reduce(lambda left, core: torch.tensordot(left, core, 1), cores)


def _close(tensor: Tensor) -> Tensor:
    """Trace over the first and the last index."""
    return tensor.movedim(-1, 1).diagonal(dim1=0, dim2=1).sum(-1)


def _ring_kernel(module: RingConv2d) -> Tensor:
    middle = to_dense(module.middle)  # (left, right, kh, kw)
    cores = [*module.out_cores, middle.flatten(2).transpose(1, 2), *module.in_cores]
    tensor = _close(_train(cores))
    outputs = math.prod(core.shape[1] for core in module.out_cores)
    kernel = tensor.reshape(outputs, middle.shape[2] * middle.shape[3], -1).transpose(1, 2)
    return kernel.unflatten(2, tuple(middle.shape[2:]))


def _tt_matrix(module: TTMatrixLinear) -> Tensor:
    cores = list(module.cores)
    d = len(cores)
    flat = [core.flatten(1, 2) for core in cores]
    tensor = _train(flat).reshape([n for core in cores for n in core.shape[1:3]])
    rows = math.prod(core.shape[1] for core in cores)
    return tensor.permute(*range(0, 2 * d, 2), *range(1, 2 * d, 2)).reshape(rows, -1)
