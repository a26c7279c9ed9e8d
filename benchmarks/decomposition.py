"""Time and error of decompositions: tdlib against TensorLy, one kernel at a time and all of a network."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import tensorly as tl
import torch
from tensorly.decomposition import parafac, partial_tucker, tensor_train
from torch import Tensor

from benchmarks.kernels import convolutions, decaying_kernel, relative_error, resnet
from benchmarks.timing import Row, Run, clock, measure, timed
from tdlib.decompositions import (
    conv_to_tt_tensor,
    cp_als,
    cp_compose,
    svd_factors,
    truncated_svd,
    tt_compose,
    tt_svd,
    tucker2,
    tucker2_compose,
)
from tdlib.decompositions.cp import SWEEPS

TOPIC = "decomposition"
DEFAULT, BEST = "TensorLy, defaults", "TensorLy, best settings"
LARGE = 512  # from here the target of 60x applies, and TensorLy's default CP4 (minutes) gets 20 sweeps
TARGETS = {  # (peer, format): least ratio. Tucker-2's are for whole networks
    (DEFAULT, "network"): 7.0,
    (BEST, "network"): 3.0,
    (DEFAULT, "cp"): 60.0,
    (BEST, "cp"): 3.0,
    (DEFAULT, "cp4"): 60.0,
    (BEST, "cp4"): 3.0,
}


@contextlib.contextmanager
def tensorly(einsum: bool) -> Iterator[None]:
    """TensorLy on torch; with ``einsum`` it contracts by einsum: faster for CP, slower for Tucker."""
    backend, algebra = tl.get_backend(), tl.tenalg.get_backend()
    tl.set_backend("pytorch")
    tl.tenalg.set_backend("einsum" if einsum else "core")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tl.set_backend(backend)
        tl.tenalg.set_backend(algebra)


def gram_svd(M: Tensor, n_eigenvecs: int | None = None, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """tdlib's Gram SVD in the form that TensorLy accepts as ``svd=``."""
    return truncated_svd(M, n_eigenvecs or min(M.shape))


def peer_tucker2(W: Tensor, rank: int, best: bool) -> Callable[[], Any]:
    """TensorLy's partial Tucker; at its best with two sweeps (as tdlib), started from our Gram SVD."""
    options: dict[str, Any] = {"svd": gram_svd, "n_iter_max": 2} if best else {}
    return lambda: partial_tucker(W, rank=[rank, rank], modes=[0, 1], **options)[0]


def peer_tt(T: Tensor, rank: int, best: bool) -> Callable[[], Any]:
    """TensorLy's TT-SVD, at its best with our Gram SVD."""
    options: dict[str, Any] = {"svd": gram_svd} if best else {}
    return lambda: tensor_train(T, rank=[1, rank, rank, 1], **options)


def peer_cp(T: Tensor, rank: int, sweeps: int | None, best: bool) -> Callable[[], Any]:
    """TensorLy's CP-ALS; at its best with our Gram SVD for the start and the contractions by einsum."""
    options: dict[str, Any] = {"svd": gram_svd} if best else {}
    if sweeps is not None:
        options["n_iter_max"] = sweeps
    return lambda: parafac(T, rank=rank, random_state=0, **options)


def kernel_rows(sizes: Sequence[int], seconds: float) -> Iterator[Row]:
    """One square 3x3 kernel per size, ranks C / 4. tdlib's CP stops at the peer's error."""
    for size in sizes:
        W = decaying_kernel(size, size, seed=size)
        r = size // 4
        T, merged = conv_to_tt_tensor(W), W.flatten(2)
        closed: dict[str, tuple[Tensor, Run, Callable[[Any], Tensor], Callable[[bool], Run]]] = {
            "tucker2": (W, partial(tucker2, W, (r, r)), lambda f: tucker2_compose(*f),
                        partial(peer_tucker2, W, r)),
            "tt": (T, partial(tt_svd, T, (r, r)), tt_compose, partial(peer_tt, T, r)),
        }  # fmt: skip
        for format, (target, ours, compose, peer) in closed.items():
            for best in (False, True):
                row = _kernel_row(format, size, r, best)
                errors = (
                    lambda f, T=target, compose=compose: relative_error(T, compose(f)),
                    lambda f, T=target, format=format: relative_error(T, _compose_peer(format, f)),
                )
                with tensorly(einsum=False):
                    yield measure(row, ours, peer(best), errors=errors, pairs=15, seconds=seconds)
        for format, target in (("cp", merged), ("cp4", W)):
            for best in (False, True):
                row = _kernel_row(format, size, r, best)
                short = size >= LARGE and not best and format == "cp4"
                theirs = peer_cp(target, r, 20 if short else None, best)
                error = partial(_cp_error, target)
                with tensorly(einsum=best):
                    seconds_b, found = timed(theirs, clock())
                    sweeps = sweeps_to(target, r, error(found))
                    row.note = f"tdlib stops at TensorLy's error, after {sweeps} sweeps"
                    if short:
                        row.note += "; TensorLy takes 20 sweeps instead of 100"
                    ours = partial(cp_als, target, r, sweeps=sweeps, tol=0.0)
                    options: dict[str, Any] = {"pairs": 9, "seconds": seconds, "warm": False}
                    yield measure(row, ours, theirs, errors=(error, error), first_b=seconds_b, **options)


def _kernel_row(format: str, size: int, rank: int, best: bool) -> Row:
    row = Row(TOPIC, f"{format}, {size}x{size}x3x3, rank {rank}", "tdlib", BEST if best else DEFAULT)
    if best or size >= LARGE:
        row.target = TARGETS.get((row.b, format))
    return row


def sweeps_to(T: Tensor, rank: int, error: float) -> int:
    """The least number of sweeps with which ``cp_als`` ends at most at ``error`` (its default if none)."""
    low, high = 1, SWEEPS
    while low < high:
        middle = (low + high) // 2
        if _cp_error(T, cp_als(T, rank, sweeps=middle, tol=0.0)) <= error:
            high = middle
        else:
            low = middle + 1
    return high


def _cp_error(T: Tensor, found: Any) -> float:
    return relative_error(T, cp_compose(found))


def _compose_peer(format: str, found: Any) -> Tensor:
    return tucker2_compose(*found) if format == "tucker2" else tl.tt_to_tensor(found)


def network_rows(names: Sequence[str], seconds: float) -> Iterator[Row]:
    """All convolutions but the stem: Tucker-2 at half the channels for k > 1, SVD at half rank for 1x1."""
    for name in names:
        model, source = resnet(name)
        weights = list(convolutions(model).values())
        del model
        for best in (False, True):
            row = Row(
                TOPIC, f"tucker2 and svd, all {len(weights)} convolutions of {name}", "tdlib", "", note=source
            )
            row.b = BEST if best else DEFAULT
            row.target = TARGETS[row.b, "network"]
            errors = (
                lambda found, weights=weights: _total_error(weights, map(ours_kernel, weights, found)),
                lambda found, weights=weights: _total_error(weights, map(peer_kernel, weights, found)),
            )
            with tensorly(einsum=False):
                yield measure(
                    row,
                    lambda weights=weights: [ours_factors(W) for W in weights],
                    lambda weights=weights, best=best: [peer_factors(W, best) for W in weights],
                    errors=errors, pairs=7, seconds=seconds, warm=False,
                )  # fmt: skip


def ours_factors(W: Tensor) -> Any:
    """tdlib's factors of one convolution of the network rows."""
    out, inp = W.shape[0], W.shape[1]
    if W.shape[2] == 1:
        return svd_factors(W.flatten(1), min(out, inp) // 2)
    return tucker2(W, (out // 2, inp // 2))


def ours_kernel(W: Tensor, found: Any) -> Tensor:
    """The kernel that those factors stand for."""
    return (found[0] @ found[1]).reshape(W.shape) if W.shape[2] == 1 else tucker2_compose(*found)


def peer_factors(W: Tensor, best: bool) -> Any:
    """TensorLy's factors at the same ranks."""
    out, inp = W.shape[0], W.shape[1]
    if W.shape[2] == 1:
        return tl.tenalg.svd_interface(
            W.flatten(1), method=gram_svd if best else "truncated_svd", n_eigenvecs=min(out, inp) // 2
        )
    options: dict[str, Any] = {"svd": gram_svd, "n_iter_max": 2} if best else {}
    return partial_tucker(W, rank=[out // 2, inp // 2], modes=[0, 1], **options)[0]


def peer_kernel(W: Tensor, found: Any) -> Tensor:
    """The kernel that TensorLy's factors stand for."""
    if W.shape[2] == 1:
        return ((found[0] * found[1]) @ found[2]).reshape(W.shape)
    return tucker2_compose(*found)


def _total_error(weights: Sequence[Tensor], approximations: Iterable[Tensor]) -> float:
    off = sum(float((w - a).double().square().sum()) for w, a in zip(weights, approximations, strict=True))
    return math.sqrt(off / sum(float(w.double().square().sum()) for w in weights))


@torch.no_grad()
def rows(quick: bool) -> Iterator[Row]:
    """All rows of this topic."""
    yield from kernel_rows((64,) if quick else (64, 128, 256, 512), 4 if quick else 30)
    yield from network_rows(("resnet18",) if quick else ("resnet18", "resnet50"), 10 if quick else 120)
