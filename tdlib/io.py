"""Save and load networks, decomposed or not: one safetensors file with tensors and, in its header, JSON.

The header holds what is needed to build the structure again (the builder's name and arguments, the replaced
layers with formats, ranks and options), the plan, versions, and the SHA-256 of the whole. A file is data:
nothing is unpickled, executed, downloaded or opened for it, and memory is taken once all shapes are checked.
Files of versions 1 (other names of factors) and 2 (no SHA-256) are read as well.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from tdlib.errors import CheckpointError, MemoryLimitError
from tdlib.files import SUM, fits, parse, read_tensors, write_tensors
from tdlib.formats import LayerPlan, blank
from tdlib.memory import Weightless, require
from tdlib.models import build, misfit, structural
from tdlib.network import INPUTS, Provenance, attach, provenance

KEY, VERSION = "tdlib", 3
FORM = {
    "version": int,
    "spec": (None, {"name": str, "classes": int, "kwargs": {str: (None, bool, int, float, str, list)}}),
    "layers": {str: {"format": str, "ranks": [int], "options": dict}},
    "plan": (None, dict),
    "inputs": (None, INPUTS),
    "aliases": {str: str},
    "versions": {str: int},
}


def save(model: nn.Module, path: str | Path) -> None:
    """Write the network to `path` (.safetensors), whole or not at all.

    A network of `tdlib.models.build`, decomposed or not, is loaded by the path alone; any other needs the
    dense network again at loading. So does one that was built with arguments which a file may not set (such
    as a class of layers): a warning names them.
    Raises: CheckpointError if the state holds something else than tensors, FileError if the file cannot be
    written.
    """
    import tdlib

    about = provenance(model)
    spec = about.spec
    if spec is not None and (foreign := _foreign(spec)):
        warnings.warn(
            f"a file may not say how {spec['name']} is built with {', '.join(foreign)}: loading {path} will "
            "need the dense network, tdlib.load(path, model=network)",
            stacklevel=2,
        )
        spec = None
    state = model.state_dict()
    tensors, aliases = once(state)
    header = {
        "version": VERSION,
        "library": tdlib.__version__,
        "spec": spec,
        "layers": {name: layer.to_dict() for name, layer in about.layers.items()},
        "plan": about.plan,
        "inputs": about.inputs,
        "aliases": aliases,
        "versions": {name: row["version"] for name, row in _versions(state).items() if "version" in row},
    }
    try:
        text = json.dumps(header)
    except TypeError as error:
        raise CheckpointError(f"the network's record cannot be written as JSON: {error}") from error
    write_tensors(path, tensors, {KEY: text, "format": "pt"})


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The network that `save` wrote, in eval mode on the CPU.

    model: the dense network, needed if the saved one did not come from `tdlib.models.build`; it is not
    changed.
    Raises: CheckpointError if the file is missing, damaged, not written by `save`, of a newer format,
    without an architecture, or does not fit `model`; MemoryLimitError where the dense network is too large.
    """
    path = Path(path)
    header, tensors = _read(path)
    layers = {name: LayerPlan.of(row) for name, row in header["layers"].items()}
    tensors |= {name: tensors[kept] for name, kept in header["aliases"].items() if kept in tensors}
    if header["version"] == 1:
        tensors = _renamed(tensors, layers)
    if model is None:
        _check_spec(path, header["spec"])
    elif provenance(model).layers:
        raise CheckpointError(
            "load needs the dense network as `model`, but this one has replaced layers already"
        )
    try:
        # First without memory, to compare all shapes; random weights, then, are overwritten at once.
        with torch.random.fork_rng(devices=[]), Weightless():
            outline = _built(header["spec"]) if model is None else copy.deepcopy(model).to("meta")
        size = sum(v.nbytes for v in [*outline.parameters(), *outline.buffers()])
        require(2 * size, f"the dense network of {path}", "load it on a larger machine")
        _fit(blank(outline, layers), tensors, outline)
        with torch.random.fork_rng(devices=[]):
            network = blank(_built(header["spec"]) if model is None else model, layers)
        _fit(network, tensors, outline)
        state: Any = OrderedDict(tensors)
        versions = {name: {"version": version} for name, version in header["versions"].items()}
        state._metadata = {**_versions(network.state_dict()), **versions}
        network.load_state_dict(state, strict=True)
    except MemoryLimitError:
        raise
    except Exception as error:  # whatever the constructors make of what a file says
        kind = header["spec"]["name"] if model is None else type(model).__name__
        raise CheckpointError(f"{path} does not fit {kind}: {error}") from error
    about = Provenance(header["spec"], provenance(network).layers, header["plan"], inputs=header["inputs"])
    attach(network, about)
    return network.eval()


def _versions(state: Any) -> dict[str, dict[str, Any]]:
    """Module name -> {"version": of its class's layout}, which torch keeps beside a state_dict's tensors."""
    return dict(getattr(state, "_metadata", {}))


def _foreign(spec: Mapping[str, Any]) -> list[str]:
    """The arguments of `build` in the spec that a file may not set."""
    return sorted(set(spec["kwargs"]) - structural(spec["name"]))


def _check_spec(path: Path, spec: Mapping[str, Any] | None) -> None:
    if spec is None:
        raise CheckpointError(
            f"{path} does not say how to build its network, since that did not come from tdlib.models.build "
            "or took arguments of its own; pass the dense network: tdlib.load(path, model=network)"
        )
    if foreign := _foreign(spec):
        raise CheckpointError(
            f"{path} wants {spec['name']} built with {', '.join(foreign)}, which a file may not set "
            f"(it may: {', '.join(sorted(structural(spec['name'])))}); pass the dense network: "
            "tdlib.load(path, model=network)"
        )


def _built(spec: Mapping[str, Any]) -> nn.Module:
    kwargs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in spec["kwargs"].items()}
    return build(spec["name"], spec["classes"], **kwargs)


def _renamed(tensors: Mapping[str, Tensor], layers: Mapping[str, LayerPlan]) -> dict[str, Tensor]:
    """The tensors with the factors of shuffled kernels under their present names, not those of version 1."""

    def now(name: str) -> str:
        layer, _, leaf = name.removesuffix(".shuffle").partition(".cores.")
        if layer not in layers or not layers[layer].format.startswith("shuffled-") or layer == name:
            return name
        return f"{layer}.parametrizations.weight." + (f"original{leaf}" if leaf else "0.shuffle")

    return {now(name): value for name, value in tensors.items()}


def _fit(network: nn.Module, tensors: Mapping[str, Tensor], dense: nn.Module) -> None:
    """Give parameters and buffers the saved dtypes, and add biases that the saved network gained. Raises:
    CheckpointError where names, shapes or kinds of number differ."""
    for prefix, module in network.named_modules():
        if "bias" in module._parameters and module.bias is None:
            saved = tensors.get(f"{prefix}.bias" if prefix else "bias")
            if saved is not None:
                replaced = prefix in provenance(network).layers
                layer: Any = dense.get_submodule(prefix) if replaced else module
                if saved.shape != layer.weight.shape[:1]:
                    raise CheckpointError(f"{prefix}.bias has shape {tuple(saved.shape)}")
                module.bias = nn.Parameter(saved.clone())
    if problems := misfit(tensors, network.state_dict()):
        raise CheckpointError(problems)
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if name in tensors and tensors[name].dtype != value.dtype:
            if tensors[name].is_floating_point() != value.is_floating_point():
                raise CheckpointError(f"{name} is {tensors[name].dtype}, the network's {value.dtype}")
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
    """(header, tensors), the header of the right form."""
    tensors, metadata = read_tensors(path)
    foreign = CheckpointError(
        f"{path} is a safetensors file, but was not written by tdlib.save; "
        "weights alone are read by tdlib.models.build(..., weights=path)"
    )
    try:
        header: dict[str, Any] = {"inputs": None, "versions": {}, **parse(metadata[KEY], path)}
    except (KeyError, TypeError, CheckpointError) as error:
        raise foreign from error
    version = header.get("version")
    if type(version) is not int or version < 1:
        raise foreign
    if version > VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this version of tdlib reads up to {VERSION}"
        )
    for key, form in FORM.items():
        if key not in header or not fits(header[key], form):
            raise CheckpointError(
                f"{path} is no network that tdlib.save wrote: {key!r} in its header is wrong"
            )
    if version >= 3 and SUM not in metadata:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is gone")
    return header, tensors
