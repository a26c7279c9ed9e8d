"""The study of the chapter on ADMM: its recipes, and what is noted of each road."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import tdlib
from tdbook import style
from tdbook.experiment import Arm, Recorder, Results, Tables, experiment
from tdbook.paths import RESULTS
from tdbook.records import read_record, records
from tdbook.settings import identity, scaled
from tdlib.data import Bundle
from tdlib.decompositions.linalg import singular_values
from tdlib.formats.projection import dense_weight, truncation_error
from tdlib.methods.admm import ADMM, pull, rho_for
from tdlib.planning import Plan
from tdlib.train import evaluate

#: Formats whose ranks are, in this order, those of the unfoldings below; of linear layers the SVD's is too.
ON_UNFOLDINGS = ("tt", "tucker2")

#: Columns of records that one figure holds together.
EXPERIMENT = ["dataset", "model", "format", "profile"]

#: Roads and sections that a run has beside direct and ADMM.
SWITCHES = ("early", "scratch", "sequential", "extras")

# Weight decay: the authors' code has 1e-4 by default and quotes its dense network as trained with 5e-4.
_SAME: dict[str, Any] = {
    "early": True, "scratch": True, "sequential": True, "extras": False, "rho": None, "weight_decay": 1e-4,
    "before": {"weight_decay": 5e-4}, "training": {}, "tuning": {}, "samples": 2000,
}  # fmt: skip
_AUTHORS = {"label_smoothing": 0.1, "schedule": "step", "step_epochs": 55, "step_gamma": 0.2}
_STRONGER = {"label_smoothing": 0.1, "nesterov": True, "warmup_epochs": 5}

#: The recipes. training: of all stages, before: of the dense network's besides, tuning: of fine-tuning's;
#: "full" is the authors' for CIFAR-10, "modern" ours, for all roads alike. pull: see the chapter; it gives
#: rho where there is none. samples: calibration images of the road in sequence.
PROFILES: dict[str, dict[str, Any]] = {
    "quick": _SAME | {
        "ratio": [2, 4, 8], "dense_epochs": 8, "epochs": 10, "finetune_epochs": 3, "lr": 0.05,
        "finetune_lr": 0.01, "batch_size": 32, "pull": math.log(2), "extras": True,
    },
    "reduced": _SAME | {
        "ratio": [2.5, 5.6], "dense_epochs": 5, "epochs": 5, "finetune_epochs": 2, "lr": 0.02,
        "finetune_lr": 0.01, "batch_size": 128, "pull": math.log(2), "scratch": False,
        "before": {"lr": 0.1, "weight_decay": 5e-4},
    },
    "full": _SAME | {
        "ratio": [2.3, 5.6], "dense_epochs": 200, "epochs": 200, "finetune_epochs": 200, "lr": 0.1,
        "finetune_lr": 0.005, "batch_size": 128, "rho": 1e-3, "training": _AUTHORS,
        "tuning": {"step_gamma": 0.4},
    },
    "modern": _SAME | {
        "ratio": [2.3, 5.6], "dense_epochs": 200, "epochs": 200, "finetune_epochs": 100, "lr": 0.2,
        "finetune_lr": 0.02, "batch_size": 256, "pull": 0.4, "training": _STRONGER,
    },
}  # fmt: skip

#: What the authors do otherwise on ImageNet, from a pretrained network.
_IMAGENET: dict[str, Any] = {
    "ratio": [2.47], "dense_epochs": 0, "epochs": 150, "finetune_epochs": 105, "lr": 0.01,
    "finetune_lr": 0.001, "batch_size": 256, "tuning": {"step_epochs": 30, "step_gamma": 0.2},
    "training": {"schedule": "step", "step_epochs": 40, "step_gamma": 0.1},
}  # fmt: skip


def profiles(dataset: str) -> dict[str, dict[str, Any]]:
    """The recipes for a data set: "full" is the authors' on ImageNet too."""
    return PROFILES | ({"full": PROFILES["full"] | _IMAGENET} if dataset == "imagenet" else {})


def set_pull(chosen: SimpleNamespace, images: int) -> None:
    """The recipe's `rho` from its `pull` where it has none, then `pull` as that of an epoch of `images`."""
    steps = max(1, images // chosen.batch_size)
    if chosen.rho is None:
        chosen.rho = rho_for(chosen.pull, chosen.lr, steps)
    chosen.pull = pull(chosen.rho, chosen.lr, steps)


def recorder(chosen: SimpleNamespace, images: int) -> Recorder:
    """Where the rows become records: under all settings but those that say which roads are run."""
    about = {k: v for k, v in identity(chosen).items() if k not in (*SWITCHES, "samples")}
    before = getattr(chosen, "note", f"{chosen.dense_epochs} dense epochs")
    lacks = (
        f"{images} training images; {before}, {chosen.epochs} of ADMM or plain training, "
        f"{chosen.finetune_epochs} of fine-tuning"
    )
    return Recorder("admm_tt", about, scaled(chosen, lacks))


def forms(net: nn.Module) -> dict[str, dict[str, Any]]:
    """Kinds of low-rank kernels to show side by side: name -> format and options of its plan."""
    if not any(isinstance(module, nn.Conv2d) for module in net.modules()):
        return {"TT": {"format": "tt"}, "SVD": {"format": "svd"}}
    return {
        "TT, three cores": {"format": "tt"},
        "TT, five modes": {"format": "tt", "order": 2},
        "Tucker-2": {"format": "tucker2"},
        "TR": {"format": "tr"},
    }


def own_format(net: nn.Module) -> str:
    """Format of the road in sequence."""
    return "tucker2" if "Tucker-2" in forms(net) else "svd"


def kept_dense(lstm: nn.Module) -> list[str]:
    """Layers of an LSTM that have nothing to give: its classifier, and a small input-to-hidden map."""
    inputs, hidden = (dense_weight(lstm, f"{part}_to_hidden").numel() for part in ("input", "hidden"))
    return ["linear", "input_to_hidden"] if inputs < 0.1 * hidden else ["linear"]


def in_forms(
    dense: Callable[[int], nn.Module], data: Bundle, roads: Mapping[str, Mapping[str, Arm]], **settings: Any
) -> pd.DataFrame:
    """The rows of each form's roads, named, with a column `form`. settings: of `experiment`."""
    arms = {f"{road}: {form}": arm for form, pair in roads.items() for road, arm in pair.items()}
    frame = experiment(dense, data, arms, **settings).frame
    parts = frame["method"].str.split(": ", expand=True)
    return named(frame.assign(method=parts[0], form=parts[1]))


def noted(net: nn.Module, data: Bundle, plan: Plan) -> Tables:
    """What decomposing a network will cut off, its test accuracy until then, and its `spectra`."""
    lost, _ = truncation_error(net, plan)
    row = {"truncation_error": lost, "uncut_test_accuracy": evaluate(net, data)["accuracy"]}
    return {"cut": [row], "spectra": spectra(net, plan)}


def columns(tables: Tables) -> dict[str, float]:
    """Columns of a row from its tables: `noted`, and "admm" where the network was trained by it."""
    found = dict(tables["cut"][0])
    if "admm" in tables:
        first, last = tables["admm"][0], tables["admm"][-1]
        found |= {"gap_reduction": first["gap"] / max(last["gap"], 1e-12)}
        found |= {"admm_test_accuracy": found["uncut_test_accuracy"], "epoch_seconds": last["seconds"]}
        found |= {"projection_seconds": last["projection_seconds"]}
    return found


def tt_unfoldings(kernel: Tensor) -> dict[str, Tensor]:
    """The matrices whose ranks are the TT-ranks: O × KI and OK × I of a kernel (O, I, kh, kw), or O × I."""
    if kernel.dim() == 2:
        return {"O × I": kernel}
    ordered = kernel.flatten(2).transpose(1, 2)  # (O, K, I)
    return {"O × K·I": ordered.flatten(1), "O·K × I": ordered.flatten(0, 1)}


def spectra(model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """Singular values of the TT unfoldings of the largest planned kernel: layer, unfolding, rank, values.

    rank: the planned one of this matrix, None where the format bounds it otherwise.
    """
    layer = max(plan, key=lambda name: dense_weight(model, name).numel())
    kernel = dense_weight(model, layer).detach().float()
    matrices = tt_unfoldings(kernel)
    known = (*ON_UNFOLDINGS, "svd") if kernel.dim() == 2 else ON_UNFOLDINGS
    ranks = plan[layer].ranks if plan[layer].format in known else ()
    within = len(plan[layer].options.get("out_modes", [0])) - 1  # ranks between the modes of one channel
    target = dict(zip(matrices, ranks[within:], strict=False))  # a 1×1 convolution has one rank
    return [
        {"layer": layer, "unfolding": name, "rank": target.get(name), "values": singular_values(m).tolist()}
        for name, m in matrices.items()
    ]


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with methods as the text writes them: ADMM with its format, as only ADMM-TT is the paper's."""
    pairs = zip(frame["method"], frame["format"], strict=True)
    return frame.assign(method=[name(method, format) for method, format in pairs])


def name(method: str, format: str) -> str:
    """What the text calls a method in a format: "ADMM-TT", "ADMM-Tucker-2", "direct"."""
    if method == "sequential":
        method = "σ + harm + sequence (ours)"
    return f"ADMM-{style.label(format)}" if method == "admm" else style.label(method)


def histories(results: Results, format: str) -> pd.DataFrame:
    """The epochs before the decomposition, a `run` each: plain training (watched from one ratio) and ADMM."""
    first, *_ = (key[1] for key in results.tables)
    parts = []
    for (method, ratio, _), tables in results.tables.items():
        if method == "admm":
            parts.append(pd.DataFrame(tables["admm"]).assign(run=f"{name(method, format)} {ratio:g}×"))
        elif method == "direct" and ratio == first:
            parts.append(pd.DataFrame(tables["plain"]).assign(run=f"plain, seen from {ratio:g}×"))
    return pd.concat(parts)


def cost(history: pd.DataFrame) -> pd.DataFrame:
    """The projections' share of an epoch's seconds (of their medians) for every run of `histories`: seconds
    themselves depend on what else the machine does."""
    table = history.groupby("run", sort=False)[["seconds", "projection_seconds"]].median()
    return (100 * table["projection_seconds"] / table["seconds"]).to_frame("projections, % of an epoch")


def in_words(frame: pd.DataFrame, format: str) -> str:
    """Where the roads stand right after the cut and at the end, a line per ratio (markdown)."""
    ours, lines = name("admm", format), []
    for (ratio, by), rows in frame.groupby(["ratio", "by"]):
        mean = rows.groupby("method", sort=False).mean(numeric_only=True)
        if not {"direct", "admm"} <= set(mean.index):
            continue
        cut, again = mean["test_accuracy_before"], mean["test_accuracy_recalibrated"]
        best, end = np.fmax(cut, again), mean["test_accuracy"]
        others = [
            f"{_lead(end['admm'] - value)} {name(road, format)} ({value:.1f} %)"
            for road, value in end.items()
            if road != "admm"
        ]
        lines.append(
            f"- **{ratio:g}×** {style.UNITS[by]}. Right after the cut {ours} has {cut['admm']:.1f} %, "
            f"with BatchNorm re-estimated {again['admm']:.1f} %; the plainly trained network "
            f"{cut['direct']:.1f} % and {again['direct']:.1f} %. With the better of the two on either side "
            f"{ours} is {_lead(best['admm'] - best['direct'])} it. "
            f"At the end {ours} has {end['admm']:.1f} %: {', '.join(others)}. "
            f"Dense: {mean['dense_test_accuracy'].mean():.1f} %."
        )
    tested, seeds = frame["n"].iloc[0], frame["seed"].nunique()
    means = f" Every figure is the mean of {seeds} seeds." if seeds > 1 else ""
    return "\n".join([*lines, f"\nOne of the {tested} test images is {100 / tested:.2f} points.{means}"])


def closeness(frame: pd.DataFrame, format: str) -> str:
    """How near to the low-rank set training has brought W, and at which accuracy (markdown)."""
    ours, lines = name("admm", format), []
    for ratio, rows in frame.groupby("ratio"):
        mean = rows.groupby("method").mean(numeric_only=True)
        if not {"direct", "admm"} <= set(mean.index):
            continue
        off, uncut = mean["truncation_error"], mean["uncut_test_accuracy"]
        lines.append(
            f"- **{ratio:g}×**: the cut takes off {off['admm']:.2f} of the weights' norm after {ours}, "
            f"{off['direct']:.2f} after plain training; uncut, W has {uncut['admm']:.1f} %, "
            f"{_lead(uncut['admm'] - uncut['direct'])} plain training ({uncut['direct']:.1f} %)."
        )
    return "\n".join(lines)


def beyond_rank(spectra: Mapping[str, Iterable[Mapping[str, Any]]]) -> pd.DataFrame:
    """Share of the squared singular values beyond the target rank, in percent: a row per unfolding, a column
    per method. spectra: method -> rows of `spectra`."""
    return pd.DataFrame(
        {
            method: {
                f"{row['layer']}  {row['unfolding']}": 100
                * sum(v * v for v in row["values"][row["rank"] :])
                / sum(v * v for v in row["values"])
                for row in rows
                if row["rank"] is not None
            }
            for method, rows in spectra.items()
        }
    )


def penalty_alone(
    pulls: Iterable[float], epochs: int = 12, steps: int = 100, lr: float = 0.01
) -> pd.DataFrame:
    """Where the penalty without a loss takes W: for each pull, after each epoch, the part of W - Z along
    W0 - Z0 in units of it, `along` by the library's own steps on a kernel near the low-rank set and by
    `theory`.

    That is: as long as P(W + U) stays Z0, with the dual's part u, an epoch takes u to u + d, then d to
    exp(-pull) (d + u) - u.
    """
    rows = []
    for strength in pulls:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
        weight = dense_weight(net, "0")
        hook = ADMM(tdlib.plan(net, (8, 8, 8), "tt", ranks={"0": (3, 3)}), rho_for(strength, lr, steps))
        context: Any = SimpleNamespace(model=net, epoch=0, device="cpu")
        hook.on_start(context)
        rest = 0.1 * (weight.detach() - hook.z["0"])
        weight.data = hook.z["0"] + rest
        sgd = torch.optim.SGD([weight], lr, momentum=0.9)
        d, u = 1.0, 0.0
        for epoch in range(epochs + 1):
            along = float(((weight.detach() - hook.z["0"]) * rest).sum() / rest.square().sum())
            rows.append({"pull": strength, "epoch": epoch, "along": along, "theory": d})
            u += d
            d = math.exp(-strength) * (d + u) - u
            context.epoch = epoch
            hook.on_epoch_start(context)
            for _ in range(steps):
                sgd.zero_grad()
                hook.before_step(context)
                sgd.step()
    return pd.DataFrame(rows)


def _lead(points: float) -> str:
    """The difference of two accuracies, in words that lead over to the second one."""
    if round(points, 1) == 0:
        return "level with"
    return f"{abs(points):.1f} points {'ahead of' if points > 0 else 'behind'}"


def saved() -> pd.DataFrame:
    """This project's records of the chapter, named; empty where it was not run."""
    found = records(RESULTS, chapter="admm_tt")
    return found if found.empty else named(found)


def learning(paths: Iterable[str]) -> pd.DataFrame:
    """Validation accuracy over the epochs of fine-tuning in records' files, a `run` per method and ratio."""
    rows = [
        {"epoch": row["epoch"], "accuracy": row["val_accuracy"],
         "run": f"{name(about['method'], about['format'])} {about['ratio']:g}×"}
        for one in map(read_record, paths)
        for about in [one["parameters"]]
        for row in one["history"]["finetune"]
    ]  # fmt: skip
    return pd.DataFrame(rows)
