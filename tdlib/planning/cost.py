"""What a network costs: trainable parameters and multiply-accumulates, counted once and by layer.

One multiply-accumulate (MAC) is one; papers that print "FLOPs" mostly mean MACs. Convolutions and matrix
products are counted, by torch's own `FlopCounterMode`; biases, norms, activations and pooling are not.
Ratios in this library leave the parameters of norm layers (BatchNorm and its kin) out on both sides, as the
papers do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tdlib.errors import TdlibError, needs
from tdlib.network import check_layered, evaluating, first

Call = tuple[tuple[int, ...], tuple[int, ...]]  # input shape, output shape
Inputs = tuple[Tensor, ...] | dict[str, Tensor]  # of one forward pass
Given = Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None
NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Row:
    """One module that owns parameters or does products itself; shapes are of its first call, with the batch
    of 1.

    `params` counts a parameter shared by several modules at the first of them. `calls` has one
    (input shape, output shape) for every call.
    """

    name: str
    kind: str
    params: int
    macs: int
    in_shape: tuple[int, ...] | None
    out_shape: tuple[int, ...] | None
    norm: bool = False
    calls: tuple[Call, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Cost:
    """Parameters and MACs of a network for one input.

    params: all parameters (every nn.Parameter once, frozen or not); bn_params: those of norm layers;
    weights = params - bn_params, the number used in ratios; macs: for a batch of one. input_shape: without
    the batch; of several inputs one shape each.
    """

    params: int
    bn_params: int
    macs: int
    layers: tuple[Row, ...]
    input_shape: tuple[Any, ...]

    @property
    def weights(self) -> int:
        """Parameters without those of norm layers: what ratios compare."""
        return self.params - self.bn_params

    def by(self, unit: str) -> int:
        """The size that a ratio in this unit compares: "params" (without norm layers) or "macs"."""
        return self.macs if unit == "macs" else self.weights

    def under(self, name: str) -> tuple[int, int]:
        """(params, macs) of the module of that name with everything inside it."""
        rows = [row for row in self.layers if row.name == name or row.name.startswith(name + ".")]
        return sum(row.params for row in rows), sum(row.macs for row in rows)

    def shares(self, names: Iterable[str], others: Iterable[str] = ()) -> dict[str, tuple[int, int]]:
        """(params, macs) of the named modules with what is inside them, except what belongs to another of the
        names or `others`."""
        found = dict.fromkeys(names, (0, 0))
        every = {*found, *others}
        for row in self.layers:
            around = [name for name in every if row.name == name or row.name.startswith(name + ".")]
            owner = max(around, key=len, default=None)
            if owner in found:
                params, macs = found[owner]
                found[owner] = params + row.params, macs + row.macs
        return found

    def to_frame(self) -> Any:
        """pandas table: one row per layer."""
        columns = ("name", "kind", "params", "macs", "in_shape", "out_shape", "norm")
        rows = [[getattr(row, c) for c in columns] for row in self.layers]
        return needs("pandas", "train").DataFrame(rows, columns=list(columns))

    def __str__(self) -> str:
        rows = [
            (r.name or "(model)", r.kind, f"{r.params:,}", f"{r.macs:,}", _shape(r.out_shape))
            for r in self.layers
        ]
        total = ("total", "", f"{self.params:,}", f"{self.macs:,}", "")
        note = (
            f"{self.params:,} parameters, {self.bn_params:,} of them in norm layers "
            f"(left out of ratios: {self.weights:,}); {self.macs:,} MACs for one input {self.input_shape}"
        )
        head, align = ("layer", "kind", "params", "MACs", "output"), ("left",) * 2 + ("right",) * 3
        return tabulate([*rows, total], head, disable_numparse=True, colalign=align) + "\n" + note


def count(
    model: nn.Module, input_shape: Sequence[int] | None = None, *, example_inputs: Given = None
) -> Cost:
    """Parameters and MACs of `model` for one input of `input_shape` (without the batch, e.g. (3, 32, 32)).

    example_inputs, instead of a shape: a tensor, several in a sequence, or a mapping of keyword arguments,
    each with a batch of 1, for networks that take integers or more than one input. The model runs once, on
    its own device, in eval mode; modes, buffers and random state are as before afterwards.
    Raises: TdlibError if the model does not run on the input.
    """
    return measure(model, input_shape, example_inputs)[0]


def measure(
    model: nn.Module, input_shape: Sequence[int] | None, example_inputs: Given = None
) -> tuple[Cost, Inputs, Any]:
    """What `count` gives, with the inputs and the output of the pass that it takes."""
    check_layered(model)
    inputs = example(model, input_shape, example_inputs)
    with untouched(model):
        total, own, calls, output = _run(model, inputs)
    rows, seen = [], set[int]()
    for name, module in model.named_modules():
        fresh = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in fresh)
        params, macs = sum(p.numel() for p in fresh), own.get(module, 0)
        if not params and not macs:
            continue
        shapes = calls.get(module, [])
        before, after = shapes[0] if shapes else (None, None)
        kind = type(module).__name__
        rows.append(Row(name, kind, params, macs, before, after, is_norm(module), tuple(shapes)))
    params = sum(row.params for row in rows)
    bn_params = sum(row.params for row in rows if row.norm)
    return Cost(params, bn_params, total, tuple(rows), shape_of(inputs)), inputs, output


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a normalisation layer, of torch or by its class name (timm's LayerNorm2d, ...);
    one that holds a matrix (a "NormedLinear") is none."""
    leaf = not any(True for _ in module.children())
    named = leaf and "norm" in type(module).__name__.lower() and not matrices(module)
    return isinstance(module, NORMS) or named


def matrices(module: nn.Module) -> list[str]:
    """Names of the module's own parameters that extend along two axes or more (a scale per channel does
    not)."""
    own = module._parameters.items()
    return [name for name, p in own if p is not None and sum(n > 1 for n in p.shape) > 1]


def example(model: nn.Module, input_shape: Sequence[int] | None, example_inputs: Given) -> Inputs:
    """The example inputs, on the model's device; or for a shape one random input from [0, 1), always the same
    one, in dtype and on device of the model's first floating-point parameter.

    Raises: TdlibError unless one of the two is given, in the form that `count` describes.
    """
    if (input_shape is None) == (example_inputs is None):
        raise TdlibError(
            "give either the shape of one input without the batch, e.g. (3, 32, 32), or example_inputs"
        )
    place = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    if input_shape is not None:
        shape = tuple(int(n) for n in input_shape)
        if min(shape, default=1) < 1:
            raise TdlibError(f"input_shape {shape} is no shape: every size must be at least 1")
        return (torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)).to(place),)
    given = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(given, Sequence | Mapping) or not given:
        raise TdlibError(f"example_inputs are tensors, got {type(given).__name__}: {given!r}")
    for x in given.values() if isinstance(given, Mapping) else given:
        found = tuple(x.shape) if isinstance(x, Tensor) else repr(x)
        if not isinstance(x, Tensor) or x.shape[:1] != (1,):
            raise TdlibError(f"example_inputs are one input: tensors with a batch of 1 in front, got {found}")
    if isinstance(given, Mapping):
        return {name: x.to(place.device) for name, x in given.items()}
    return tuple(x.to(place.device) for x in given)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for these inputs."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def shape_of(inputs: Inputs) -> tuple[Any, ...]:
    """The shape of one input without the batch; of several, one shape each."""
    tensors = inputs.values() if isinstance(inputs, dict) else inputs
    shapes = tuple(tuple(x.shape[1:]) for x in tensors)
    return shapes[0] if len(shapes) == 1 else shapes


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; modes, buffers and random state restored after."""
    # By module, for a forward may put another tensor in a buffer's place.
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluating(model):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)


def _run(
    model: nn.Module, inputs: Inputs
) -> tuple[int, dict[nn.Module, int], dict[nn.Module, list[Call]], Any]:
    """One forward pass: all MACs, those that each module did itself (not in a child), the shapes it was
    called with, and the output."""
    counter = FlopCounterMode(display=False)
    own: dict[nn.Module, int] = {}
    calls: dict[nn.Module, list[Call]] = {}
    stack: list[tuple[int, int]] = []  # FLOPs when the module was entered, and those of finished children

    def enter(module: nn.Module, args: Any) -> None:
        stack.append((counter.get_total_flops(), 0))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        start, inner = stack.pop()
        used = counter.get_total_flops() - start
        own[module] = own.get(module, 0) + (used - inner) // 2
        if stack:
            stack[-1] = stack[-1][0], stack[-1][1] + used
        given = first(args, kwargs)
        if isinstance(given, Tensor) and isinstance(output, Tensor):
            calls.setdefault(module, []).append((tuple(given.shape), tuple(output.shape)))

    try:
        with ExitStack() as context:
            for module in model.modules():
                context.callback(module.register_forward_pre_hook(enter).remove)
                context.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
            context.enter_context(_unfused(model))
            with counter:
                result = call(model, inputs)
    except Exception as error:  # the model's own code
        what = f"{type(error).__name__}: {error}"
        raise TdlibError(
            f"the model does not run on one input of shape {shape_of(inputs)}: {what}"
        ) from error
    return counter.get_total_flops() // 2, own, calls, result


@contextmanager
def _unfused(model: nn.Module) -> Iterator[None]:
    """Plain kernels inside: fused ones (recurrent layers in oneDNN, attention) hide their products from any
    counter."""
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        # torch.backends.mkldnn.flags would warn about TF32 on machines without an Intel GPU.
        torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)


def _shape(shape: Sequence[int] | None) -> str:
    return "×".join(map(str, shape[1:])) if shape else "-"
