"""The look of every figure: one theme, set on import, and one name and colour per format and method.

Tables carry short keys ("tucker2", "distribution-aware"); `label` gives the name that the text writes and
`palette` the colours, so that a reader meets the same colour for the same thing in every chapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import seaborn as sns

#: Okabe and Ito's colours, distinguishable with any colour vision; grey is kept for the dense network.
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31")
BLUE, RED, GREEN, PINK, ORANGE, SKY, PURPLE, BROWN = CYCLE
GREY, BLACK = "#777777", "#000000"

#: Key -> name in the text, colour.
NAMES = {
    "dense": ("dense", GREY),
    # formats
    "cp": ("CP", GREEN), "cp4": ("CP4", ORANGE), "tucker2": ("Tucker-2", RED), "tt": ("TT", BLUE),
    "tr": ("TR", PINK), "svd": ("SVD", SKY), "tt-matrix": ("TT-matrix", PURPLE),
    # methods
    "direct": ("direct", SKY), "one-shot": ("one-shot", SKY), "scratch": ("from scratch", ORANGE),
    "early": ("decomposed early", GREEN), "admm": ("ADMM", BLUE), "admm-tt": ("ADMM-TT", BLUE),
    "iterative": ("iterative", GREEN), "one schedule": ("iterative, one schedule", PURPLE),
    "orthogonalised": ("iterative, orthogonalised", ORANGE), "vbmf": ("iterative, vbmf", BROWN),
    "lower": ("iterative, lower ranks", GREEN),
    "lower, one schedule": ("iterative, lower ranks, one schedule", PURPLE),
    "lower, orthogonalised": ("iterative, lower ranks, orthogonalised", ORANGE),
    "lower, vbmf": ("iterative, lower ranks, vbmf", BROWN),
    "rstd": ("RsTD", PINK), "narrower dense": ("narrower dense", BROWN),
    "distribution-aware": ("distribution-aware", RED),
    "σ (paper)": ("Σ (paper)", RED),
    "σ + harm + sequence (ours)": ("Σ + harm + sequence (ours)", PURPLE),
    # what the chapter on the norm of the inputs adds, step by step
    "frobenius": ("kernel error (Frobenius)", SKY), "sigma": ("output error (Σ)", RED),
    "global": ("+ ranks by harm", GREEN), "sequential": ("+ in sequence", BLUE),
    "bias": ("+ bias correction", PURPLE), "batchnorm": ("in sequence + BatchNorm", ORANGE),
    "transfer": ("Σ of other images", PINK),
    # arms of the chapter on shuffling
    "shuffled": ("shuffled", PINK), "folded": ("folded", GREEN),
    "kernel": ("kernel", BLUE), "random subspace": ("random subspace", ORANGE),
    "noise": ("Gaussian noise", GREY),
    "all layers": ("all layers", BLACK),
}  # fmt: skip
#: What a ratio counts, in words.
UNITS = {"params": "parameters", "macs": "MACs"}

_KEYS = {text: key for key, (text, _) in NAMES.items()}

sns.set_theme("paper", "whitegrid", palette=CYCLE, rc={
    "figure.dpi": 130, "savefig.dpi": 130, "axes.grid": True, "grid.color": "#e3e3e3",
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "lines.linewidth": 1.7, "lines.markersize": 5, "image.cmap": "RdBu_r", "image.interpolation": "nearest",
})  # fmt: skip


def label(name: object) -> str:
    """A format's or method's name as the text writes it; anything else unchanged."""
    return NAMES[_key(name)][0] if _key(name) in NAMES else str(name)


def colour(name: object) -> str:
    """The colour of a format or method. Raises KeyError for anything else, see `palette`."""
    return NAMES[_key(name)][1]


def palette(names: Iterable[object]) -> dict[Any, Any]:
    """Each name and its colour; names without one share the rest of the cycle, many a scale."""
    names = list(dict.fromkeys(names))
    own = {name: colour(name) for name in names if _key(name) in NAMES}
    others = [name for name in names if name not in own]
    free = [tint for tint in CYCLE if tint not in own.values()]
    tints = free if len(others) <= len(free) else sns.color_palette("crest", len(others))
    return own | dict(zip(others, tints, strict=False))


def _key(name: object) -> str:
    """The key of a name, also of one as the text writes it; "ADMM, tuned" has the key of "ADMM"."""
    text = str(name)
    return _KEYS.get(text) or text.partition(",")[0].lower().replace("_", "-")
