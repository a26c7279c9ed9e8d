"""Save and load networks, decomposed or not: one safetensors file with tensors and, in its header, JSON.

The header holds what is needed to build the structure again (the builder's name and arguments, the replaced
layers with formats, ranks and options), the plan, and versions. Nothing is ever unpickled.
Files of version 1, the only one before this, are read as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from tdlib.errors import CheckpointError, TdlibError
from tdlib.files import write_atomic
from tdlib.formats import LayerPlan, skeleton
from tdlib.models import build
from tdlib.network import Provenance, attach, provenance

KEY, VERSION = "tdlib", 2


def save(model: nn.Module, path: str | Path) -> None:
    """Write the network to `path` (.safetensors), whole or not at all.

    A network of `tdlib.models.build`, decomposed or not, is loaded by the path alone; any other needs the
    dense network again at loading. Raises: CheckpointError if the state holds something else than tensors,
    FileError if the file cannot be written.
    """
    import tdlib

    path = Path(path)
    about = provenance(model)
    spec = about.spec
    if spec is not None:
        spec = {**spec, "kwargs": {k: v for k, v in spec.get("kwargs", {}).items() if k != "weights"}}
    tensors, aliases = once(model.state_dict())
    header = {
        "version": VERSION,
        "library": tdlib.__version__,
        "spec": spec,
        "layers": {name: layer.to_dict() for name, layer in about.layers.items()},
        "plan": about.plan,
        "inputs": about.inputs,
        "aliases": aliases,
    }
    try:
        text = json.dumps(header)
    except TypeError as error:
        raise CheckpointError(f"the network's record cannot be written as JSON: {error}") from error
    write_atomic(path, to_bytes(tensors, metadata={KEY: text, "format": "pt"}))


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The network that `save` wrote, in eval mode on the CPU.

    model: the dense network, needed if the saved one did not come from `tdlib.models.build`; it is not
    changed.
    Raises: CheckpointError if the file is missing, corrupt, not written by `save`, of a newer format,
    without an architecture, or does not fit `model`.
    """
    path = Path(path)
    header, tensors = _read(path)
    with torch.random.fork_rng(devices=[]):  # building draws random weights that are overwritten at once
        dense = _dense(path, header, model)
        try:
            layers = {name: LayerPlan.of(row) for name, row in header["layers"].items()}
            network = skeleton(dense, layers)
        except TdlibError as error:
            raise CheckpointError(f"{path} does not fit {type(dense).__name__}: {error}") from error
    tensors |= {name: tensors[kept] for name, kept in header["aliases"].items() if kept in tensors}
    if header["version"] == 1:
        tensors = _renamed(tensors, layers)
    _fit(network, tensors)
    try:
        network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {type(dense).__name__}: {error}") from error
    about = Provenance(header["spec"], provenance(network).layers, header["plan"], inputs=header["inputs"])
    attach(network, about)
    return network.eval()


def _renamed(tensors: Mapping[str, Tensor], layers: Mapping[str, LayerPlan]) -> dict[str, Tensor]:
    """The tensors with the factors of shuffled kernels under their present names, not those of version 1."""

    def now(name: str) -> str:
        layer, _, leaf = name.removesuffix(".shuffle").partition(".cores.")
        if layer not in layers or not layers[layer].format.startswith("shuffled-") or layer == name:
            return name
        return f"{layer}.parametrizations.weight." + (f"original{leaf}" if leaf else "0.shuffle")

    return {now(name): value for name, value in tensors.items()}


def _dense(path: Path, header: Mapping[str, Any], model: nn.Module | None) -> nn.Module:
    """The dense network whose layers are to be replaced."""
    if model is not None:
        if provenance(model).layers:
            raise CheckpointError(
                "load needs the dense network as `model`, but this one has replaced layers already"
            )
        return model
    spec = header["spec"]
    if spec is None:
        raise CheckpointError(
            f"{path} does not say how to build its network, since that did not come from tdlib.models.build; "
            "pass the dense network: tdlib.load(path, model=network)"
        )
    try:
        kwargs: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in spec["kwargs"].items()
        }
        return build(spec["name"], spec["classes"], **kwargs)
    except (KeyError, TypeError, ValueError, ImportError) as error:
        raise CheckpointError(f"the network of {path} cannot be built: {error}") from error


def _fit(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers the saved dtypes, and add biases that the saved network gained."""
    for prefix, module in network.named_modules():
        if "bias" in module._parameters and module.bias is None:
            saved = tensors.get(f"{prefix}.bias" if prefix else "bias")
            if saved is not None:
                module.bias = nn.Parameter(saved.clone())
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if name in tensors and tensors[name].dtype != value.dtype:
            value.data = value.data.to(tensors[name].dtype)


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the network's tensors as a safetensors file."""
    return len(to_bytes(once(model.state_dict())[0]))


def once(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors without repetition, {repeated name: the name it is kept under})."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name!r} of the state is a {type(value).__name__}; only tensors can be saved"
            )
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            kept = value.detach().cpu().contiguous()
            # A view into a larger storage (fused recurrent weights) would be refused as shared memory.
            whole = kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
            tensors[name] = kept if whole else kept.clone()
    return tensors, aliases


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    try:
        header = json.loads(text or "")
        version = header["version"]
        fields = {key: header[key] for key in ("version", "spec", "layers", "plan", "aliases")}
        fields["inputs"] = header.get("inputs")  # absent in older files
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is a safetensors file, but was not written by tdlib.save; "
            "weights alone are read by tdlib.models.build(..., weights=path)"
        ) from error
    if version not in range(1, VERSION + 1):
        raise CheckpointError(
            f"{path} has format version {version}; this version of tdlib reads up to {VERSION}"
        )
    return fields, tensors
