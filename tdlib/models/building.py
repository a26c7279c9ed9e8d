"""``build`` and the networks that are shipped with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tdlib.errors import DataError, TdlibError, unknown
from tdlib.models.cifar_resnet import DEPTHS, CifarResNet
from tdlib.models.external import (
    build_timm,
    build_torchvision,
    timm_inputs,
    torchvision_inputs,
    torchvision_names,
)
from tdlib.models.small import LSTMClassifier, SmallCNN
from tdlib.models.weights import load_weights, read_state_dict, saved_inputs
from tdlib.network import Provenance, attach

OWN = (*DEPTHS, "cnn", "lstm")
ZOO = Path(__file__).parent / "zoo"

# What a file may say to `build`, besides name and classes: plain values that shape the network. None of them
# opens a file or a connection, and none makes a constructor compute tables of its size.
TORCHVISION = frozenset(
    "aux_logits attention_dropout drop_rate dropout groups image_size init_weights round_nearest width_mult "
    "replace_stride_with_dilation stochastic_depth_prob transform_input width_per_group "
    "zero_init_residual".split()
)
TIMM = frozenset("drop_block_rate drop_path_rate drop_rate global_pool output_stride".split())


def available() -> list[str]:
    """Every name that ``build`` knows: the library's own, then torchvision's. timm's are written
    ``timm:NAME``.
    """
    return [*OWN, *torchvision_names()]


def build(
    name: str,
    classes: int | Sequence[str],
    *,
    input_shape: Sequence[int] | None = None,
    weights: str | Path | None = None,
    new_head: bool = False,
    **kw: Any,
) -> nn.Module:
    """Build a classifier for ``classes`` classes (a count, or the list of their names).

    name: ``resnet20|32|44|56|110`` (32x32 images, option-A shortcuts), ``cnn``, ``lstm``, a torchvision name
    (``resnet18`` or ``torchvision:resnet18``) or ``timm:NAME``.
    input_shape: (channels, height, width) of one input; ``cnn`` and ``lstm`` need it (default (1, 8, 8), the
    digits), others use its channel count for their first convolution.
    weights: a torchvision weight name (``DEFAULT``, ``IMAGENET1K_V1``), a local file (safetensors or a
    state_dict) or a name of ``shipped()``.
    new_head: keep a fresh last layer where the weights have another number of classes.

    Raises UnknownName, DataError where weights do not fit, TdlibError where timm is needed and missing.
    """
    count = classes if isinstance(classes, int) else len(classes)
    if count < 1:
        raise TdlibError(f"classes must be at least 1, got {count}")
    shape = tuple(int(n) for n in input_shape) if input_shape is not None else None
    file, hub = _weight_source(weights)
    try:
        if name in OWN:
            model = _own(name, count, shape, hub, kw)
        elif name.startswith("timm:"):
            model = build_timm(name.removeprefix("timm:"), count, shape, hub, new_head, kw)
        else:
            name = name.removeprefix("torchvision:")
            if name not in torchvision_names():
                raise unknown("model", name, [*available(), "timm:NAME"])
            model = build_torchvision(name, count, shape, hub, new_head, kw)
    except TypeError as error:
        raise DataError(f"cannot build {name!r} with these options: {error}") from error
    if file is not None:
        load_weights(model, file, new_head=new_head)
    kwargs = kw if shape is None else {**kw, "input_shape": list(shape)}
    inputs = None if weights is None else inputs_of(name, weights)
    if inputs and shape and shape[0] != inputs["input_shape"][0]:
        inputs = None  # the first convolution is fresh
    if inputs and len(inputs["classes"] or ()) != count:
        inputs["classes"] = None  # the last layer is fresh
    attach(model, Provenance({"name": name, "classes": count, "kwargs": kwargs}, inputs=inputs))
    return model


def inputs_of(name: str, weights: str | Path | None) -> dict[str, Any] | None:
    """What these weights of the network were trained on, as `Provenance.inputs`: those of torchvision and
    timm (whose classes are left out), and files of `tdlib.save`. None for others, which do not say.

    Raises DataError for a file that cannot be read, UnknownName, TdlibError where timm is needed and missing.
    """
    file, hub = _weight_source(weights)
    if file is not None:
        return saved_inputs(file)
    if hub is None or name in OWN:
        return None
    if name.startswith("timm:"):
        return timm_inputs(name.removeprefix("timm:"), hub)
    return torchvision_inputs(name.removeprefix("torchvision:"), hub)


def structural(name: str) -> frozenset[str]:
    """The arguments of `build` that a saved network of this name may bring along."""
    own = {"cnn": {"width", "norm"}, "lstm": {"hidden"}, **{depth: {"width"} for depth in DEPTHS}}
    further = own.get(name, TIMM if name.startswith("timm:") else TORCHVISION)
    return frozenset({"input_shape", *further})


def pretrained(name: str) -> nn.Module:
    """A network trained by this project and shipped with the package (offline), e.g.
    ``resnet20-cifar100-reduced``; `shipped` says how well it was trained.

    Raises UnknownName listing what is there.
    """
    if name not in _zoo():
        raise unknown("pretrained network", name, _zoo())
    state, meta = read_state_dict(_zoo()[name])
    shape = [int(n) for n in meta["input_shape"].split(",")]
    return load_weights(build(meta["name"], int(meta["classes"]), input_shape=shape), state, source=name)


def shipped() -> dict[str, dict[str, str]]:
    """The networks of ``pretrained``: name -> network, classes, data set, the scale of its training and the
    test accuracy measured for it.
    """
    return {name: read_state_dict(path)[1] for name, path in _zoo().items()}


def _zoo() -> dict[str, Path]:
    return {path.stem: path for path in sorted(ZOO.glob("*.safetensors"))}


def _own(name: str, classes: int, shape: tuple[int, ...] | None, hub: str | None, kw: Any) -> nn.Module:
    if hub is not None:
        raise DataError(
            f"{name} has no weights named {hub!r} and no file of that name exists; give a local file"
        )
    if name in DEPTHS:
        return CifarResNet(DEPTHS[name], classes, shape[0] if shape else 3, **kw)
    shape = shape or (1, 8, 8)
    if name == "cnn":
        return SmallCNN(classes, shape[0], **kw)
    if len(shape) not in (2, 3):
        raise DataError(
            f"lstm takes images (channels, rows, columns) or sequences (steps, features), not shape {shape}"
        )
    features = shape[1] if len(shape) == 2 else shape[0] * shape[2]  # the rows of images are time steps
    return LSTMClassifier(classes, features, **kw)


def _weight_source(weights: str | Path | None) -> tuple[Path | None, str | None]:
    """Split ``weights`` into (local file, name at torchvision or timm)."""
    if weights is None:
        return None, None
    path = Path(weights).expanduser()
    if path.is_file():
        return path, None
    if str(weights) in _zoo():
        return _zoo()[str(weights)], None
    if isinstance(weights, Path) or path.suffix or len(path.parts) > 1:
        raise DataError(f"weight file {path} does not exist")
    return None, str(weights)
