"""The primer chapter: tables about one kernel, and the pictures of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn

from tdbook import style
from tdbook.figures.common import canvas, lines
from tdlib.formats import get_format

FORMATS = ("cp", "tucker2", "tt", "tr")


def largest_kernel(model: nn.Module) -> tuple[str, Tensor]:
    """Name and weight (O, I, kh, kw) of the model's largest convolution with a window, detached, float32."""
    found = {
        name: module.weight.detach().float().cpu()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1 and max(module.kernel_size) > 1
    }
    name = max(found, key=lambda key: found[key].numel())
    return name, found[name]


def unfoldings(weight: Tensor) -> dict[str, Tensor]:
    """The three unfoldings of a kernel (O, I, kh, kw), window merged to K: each mode along the rows once."""
    cube = weight.flatten(2)
    return {
        f"output ({cube.shape[0]} rows)": cube.flatten(1),
        f"input ({cube.shape[1]} rows)": cube.transpose(0, 1).flatten(1),
        f"window ({cube.shape[2]} rows)": cube.permute(2, 0, 1).flatten(1),
    }


def directions(kernels: Mapping[str, Tensor], share: float = 0.9) -> pd.DataFrame:
    """How many singular directions of its channel unfoldings hold this share of a kernel's squared norm."""
    table: dict[str, dict[str, str]] = {}
    for name, kernel in kernels.items():
        for mode, matrix in list(unfoldings(kernel).items())[:2]:
            energy = torch.linalg.svdvals(matrix.double()).square().cumsum(0)
            needed = 1 + int((energy < share * energy[-1]).sum())
            table.setdefault(mode.split()[0], {})[name] = f"{needed} of {len(energy)}"
    return pd.DataFrame.from_dict(table, orient="index")


def as_tucker2(cores: Sequence[Tensor], shape: Sequence[int]) -> list[Tensor]:
    """Three TT cores, (1, O, r_o), (r_o, K, r_i), (r_i, I, 1), as Tucker-2's factors: core, output, input."""
    first, middle, last = cores
    core = middle.transpose(1, 2).unflatten(2, tuple(shape[2:]))
    return [core, first[0], last[:, :, 0].T]


def batchnorm_share(table: pd.DataFrame, dense: float) -> str:
    """Markdown: for each `asked` ratio the mean distance of the formats' `test_accuracy` and `recalibrated`
    from the dense network's, and what lies between them."""
    found = []
    for ratio, at in table.groupby("asked"):
        before, fresh = at["test_accuracy"].mean(), at["recalibrated"].mean()
        found.append(
            f"- {ratio:g}×, mean of {len(at)} formats, in points from the dense network: as decomposed "
            f"{before - dense:+.1f}, with BatchNorm re-estimated {fresh - dense:+.1f}; its statistics alone "
            f"make {fresh - before:+.1f}."
        )
    return "\n".join(found)


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """Frobenius norm of the difference divided by that of ``weight``."""
    return float((weight - approximation).norm() / weight.norm())


def error_curves(weight: Tensor) -> pd.DataFrame:
    """Relative error of one kernel against its ratio: a row per format and point of the uniform rank family.

    Columns format, ranks, ratio (dense / compressed parameters), error. Points that are not smaller than the
    dense kernel, or more than fifty times smaller, are left out.
    """
    rows = []
    for name in FORMATS:
        bound = get_format(name).bind(weight.shape)
        for ranks in dict.fromkeys(bound.uniform(f) for f in np.geomspace(0.04, 1.0, 14)):
            ratio = weight.numel() / bound.cost(ranks)[0]
            if 1 < ratio <= 50:
                error = relative_error(weight, bound.project(weight, ranks))
                rows.append({"format": name, "ranks": ranks, "ratio": ratio, "error": error})
    return pd.DataFrame(rows)


def at_ratio(weight: Tensor, ratio: float) -> dict[str, Tensor]:
    """The kernel projected onto each format, at the largest uniform ranks that still reach ``ratio``."""
    found = {}
    for name in FORMATS:
        bound = get_format(name).bind(weight.shape)
        family = [bound.uniform(fraction) for fraction in np.linspace(0.01, 1.0, 200)]
        fits = [ranks for ranks in family if bound.cost(ranks)[0] * ratio <= weight.numel()]
        found[name] = bound.project(weight, fits[-1] if fits else family[0])
    return found


def kernel_pictures(kernels: Mapping[str, Tensor], rows: int = 6, columns: int = 12) -> Figure:
    """A corner of each kernel as pictures: one small window per (output, input) pair, common colour scale."""
    rows = min([rows, *(k.shape[0] for k in kernels.values())])
    columns = min([columns, *(k.shape[1] for k in kernels.values())])
    fig, axes = canvas(1, len(kernels), size=(2.6 * len(kernels), 0.5 + 2.6 * rows / columns))
    limit = max(float(k[:rows, :columns].abs().max()) for k in kernels.values())
    for ax, (name, kernel) in zip(axes[0], kernels.items(), strict=True):
        tile = kernel[:rows, :columns]
        gap = torch.nn.functional.pad(tile, (0, 1, 0, 1), value=float("nan"))
        sheet = gap.permute(0, 2, 1, 3).reshape(rows * gap.shape[2], -1).numpy()
        ax.imshow(sheet, vmin=-limit, vmax=limit)
        ax.set_title(style.label(name))
        ax.set_axis_off()
    return fig


def unfolding_pictures(named: Mapping[str, Tensor], columns: int = 120) -> Figure:
    """The first columns of each unfolding as an image, rows to one scale."""
    heights = [max(matrix.shape[0], 12) for matrix in named.values()]
    fig, axes = canvas(len(named), 1, size=(7.4, 0.9 * len(named) + sum(heights) / 40), height_ratios=heights)
    for ax, (name, matrix) in zip(axes[:, 0], named.items(), strict=True):
        limit = float(matrix.abs().quantile(0.99))
        ax.imshow(matrix[:, :columns].numpy(), vmin=-limit, vmax=limit, aspect="auto")
        ax.set_title(f"{name}, first {min(columns, matrix.shape[1])} of {matrix.shape[1]} columns")
        ax.set_axis_off()
    return fig


def _box(ax: Axes, x: float, y: float, text: str, tint: str, width: float = 0.9) -> None:
    corner, rounded = (x - width / 2, y - 0.28), "round,pad=0.02,rounding_size=0.1"
    look: dict[str, Any] = {"boxstyle": rounded, "facecolor": tint, "edgecolor": "none", "zorder": 2}
    ax.add_patch(FancyBboxPatch(corner, width, 0.56, **look))
    ax.text(x, y, text, ha="center", va="center", color="white", fontsize=8.5, zorder=3)


def diagrams() -> Figure:
    """The four decompositions as diagrams: a box per array, a line per summed index, a stub per open mode."""
    fig, axes = canvas(1, 4, size=(10.4, 2.6))
    plan = {
        "cp": ([(0, "O×R"), (1.5, "I×R"), (3, "K×R")], "one R shared by all three"),
        "tucker2": ([(0, "O×r₁"), (1.5, "r₁×r₂×K"), (3, "I×r₂")], "two ranks, dense core"),
        "tt": ([(0, "O×r₁"), (1.5, "r₁×K×r₂"), (3, "r₂×I")], "a chain, ranks r₁ and r₂"),
        "tr": ([(0, "r₀×O×r₁"), (1.5, "r₁×K×r₂"), (3, "r₂×I×r₀")], "a closed chain"),
    }
    modes = {"cp": "O I K", "tucker2": "O K I", "tt": "O K I", "tr": "O K I"}
    for ax, (name, (boxes, note)) in zip(axes[0], plan.items(), strict=True):
        line = {"color": style.GREY, "lw": 1.8, "zorder": 1}
        if name == "cp":  # one index touches all three factors
            for x, _ in boxes:
                ax.plot([x, 1.5], [0, 1.0], **line)
            ax.plot(1.5, 1.0, "o", color=style.GREY, ms=7, zorder=3)
            ax.text(1.66, 1.08, "R", fontsize=8.5)
        else:
            ax.plot([0, 3], [0, 0], **line)
        if name == "tr":
            ax.plot([0, 0, 3, 3], [0, 0.85, 0.85, 0], **line)
            ax.text(1.5, 0.95, "r₀", fontsize=8.5, ha="center")
        for (x, text), mode in zip(boxes, modes[name].split(), strict=True):
            ax.plot([x, x], [0, -0.8], **line)
            ax.text(x, -1.12, mode, ha="center", va="center", fontsize=8.5)
            _box(ax, x, 0, text, style.colour(name), 1.15)
        ax.set(xlim=(-0.8, 3.8), ylim=(-1.4, 1.5), title=f"{style.label(name)}: {note}")
        ax.set_axis_off()
    return fig


def error_figure(curves: pd.DataFrame, title: str | None = None) -> Figure:
    """Relative error against ratio, a line per format, from ``error_curves``."""
    heading = "ratio (parameters, this kernel)"
    return lines(
        curves, "ratio", "error", "format", logx=True, xlabel=heading, ylabel="relative error", title=title
    )
