"""What a program that knows nothing of mpizero finds when ``mpizero exec`` runs it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

from mpizero import LaunchError, World
from mpizero_torch import runtime
from mpizero_torch.distributed import BACKEND
from mpizero_torch.distributed.choosing import take_all


def prepare(*, keep_backends: bool) -> World:
    """Start MPI, set torchrun's variables, and make ``torch.distributed`` run over MPI. Collective.

    ``keep_backends``: a process group gets the backend that the program names; by default the
    backend is "mpizero", whichever of torch's own it names.
    """
    world = runtime.init()
    if not keep_backends:
        take_all(BACKEND)
    if world.size > 1:
        started: Any = torch.multiprocessing
        started.spawn = functools.partial(_spawn, world)
    return world


def _spawn(
    world: World,
    fn: Callable[..., Any],
    args: tuple[Any, ...] = (),
    nprocs: int = 1,
    join: bool = True,
    daemon: bool = False,
    start_method: str = "spawn",
) -> None:
    """``torch.multiprocessing.spawn`` where a node's ranks are there already: be one of them."""
    if nprocs != world.local_size or not join:
        raise LaunchError(
            f"torch.multiprocessing.spawn(): the program starts {nprocs} processes, but mpirun has "
            f"started {world.local_size} on this node, each of which runs it. Start as many with "
            "mpirun as it would (one for each GPU, mostly), or have it start none."
        )
    fn(world.local_rank, *args)
