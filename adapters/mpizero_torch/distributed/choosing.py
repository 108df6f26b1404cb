"""Which backend a process group gets: "mpizero" where the program names none.

And, if that is asked for, where it names one of torch's own.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch.distributed as dist
from torch.distributed import device_mesh

from mpizero_torch.distributed.c10d import distributed_c10d

# Where programs, and torch itself, have the functions from.
_PLACES: tuple[Any, ...] = (dist, distributed_c10d, device_mesh)

_TORCHS = frozenset({"gloo", "nccl", "mpi", "ucc"})

_all_backend = ""  # that takes the place of torch's own


def make_default(backend: str) -> None:
    """From here on groups get ``backend`` where the program names none."""
    devices = ("cpu", "cuda")
    dist.Backend.default_device_backend_map.update(dict.fromkeys(devices, backend))
    _wrap("init_process_group", backend)
    _wrap("new_group", None)  # that of the process group


def take_all(backend: str) -> None:
    """From here on ``backend`` takes the place of torch's own, however the program names them.

    And ranks find each other through MPI, whatever address or file the program says.
    """
    global _all_backend
    _all_backend = backend


def takes_all() -> bool:
    """Has ``take_all`` been called?"""
    return bool(_all_backend)


def _wrap(name: str, default: str | None) -> None:
    stock = getattr(distributed_c10d, name)
    takes = inspect.signature(stock)

    @functools.wraps(stock)
    def start(*args: Any, **kwargs: Any) -> Any:
        given = takes.bind(*args, **kwargs).arguments
        named = given.get("backend")
        given["backend"] = default if named is None else _instead_of(named)
        if _all_backend and str(given.get("init_method", "")).startswith(("tcp://", "file://")):
            del given["init_method"]
        return stock(**given)

    for place in _PLACES:
        if getattr(place, name, None) is stock:
            setattr(place, name, start)


def _instead_of(named: Any) -> Any:
    """ "gloo", or "cpu:gloo,cuda:nccl": what is there in its place."""
    parts = {part.rpartition(":")[2] for part in str(named).lower().split(",")}
    return _all_backend if _all_backend and parts <= _TORCHS else named
