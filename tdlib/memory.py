"""How much memory there is, a clear refusal of work that needs more, and networks that take none."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tdlib.errors import MemoryLimitError

SHARE = 0.8  # of what is free may be used
CGROUP = Path("/sys/fs/cgroup")
SIZED = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
VALUES = "normal_ uniform_ fill_ zero_ erfinv_ mul_ add_ clamp_ copy_".split()
FILLED = {getattr(Tensor, name) for name in VALUES}


def free(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be had on the device; in a container, of its share."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no cgroup (version 2), or "max": no limit
        limit = int((CGROUP / "memory.max").read_text())
        used = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        found = min(found, limit - int(used["anon"]))  # the page cache gives way
    return max(0, found)


def require(
    need: float, what: str, mend: str, *, limit: float | None = None, device: torch.device | str = "cpu"
) -> None:
    """Raises MemoryLimitError where `what` needs more than `limit` bytes (default: 80 % of what is free).

    need: bytes at the peak, as estimated. mend: what the caller can do instead, as an imperative.
    """
    allowed = SHARE * free(device) if limit is None else limit
    if need > allowed:
        raise MemoryLimitError(
            f"{what} needs about {_gib(need)} of memory, {_gib(allowed)} may be used "
            f"({'80 % of what is free' if limit is None else 'the limit given'}): {mend}"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


class Weightless(TorchFunctionMode):
    """Inside, tensors that are made by their size (weights, above all) take no memory: device "meta".

    Setting their values does nothing. Tables (torch.arange, torch.linspace) stay real, since constructors of
    networks read them.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in FILLED and args[0].is_meta:
            return args[0]
        if func in SIZED:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
