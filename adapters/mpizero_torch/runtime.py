"""``init``: the core's, and what torch needs beside it."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

import torch

import mpizero
from mpizero import World
from mpizero_torch import half_kernels, who

if TYPE_CHECKING:
    from mpi4py import MPI

_threads_are_set = False


def init(
    comm: MPI.Intracomm | None = None, *, timeout: float | None = None, elastic: bool = False
) -> World:
    """Start MPI, bind this rank's device for torch too, and return the World.

    Collective; safe to call twice. Unless ``OMP_NUM_THREADS`` says otherwise, torch gets as many
    threads as this rank has cores: its default, all cores of the node for every rank, makes ranks
    fight for them. ``elastic``: see ``ElasticState``.

    Without ``comm`` torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    GROUP_RANK, MASTER_ADDR, MASTER_PORT) are set, for what asks them who this rank is. Raises what
    ``mpizero.init`` raises, and LaunchError where somebody has set other ones.
    """
    world = mpizero.init(comm, timeout=timeout, elastic=elastic)
    if comm is None:
        who.say_from_world(world)
        if torch.distributed.is_available():
            # Process groups of the program's, which it may now start, go over MPI by default.
            importlib.import_module("mpizero_torch.distributed")
    half_kernels.register()
    if world.device.kind == "cuda" and world.device.index is not None:
        torch.cuda.set_device(world.device.index)
    _share_cores(world)
    return world


def _share_cores(world: World) -> None:
    global _threads_are_set
    if _threads_are_set or "OMP_NUM_THREADS" in os.environ:
        return
    _threads_are_set = True
    torch.set_num_threads(max(1, int(world.cores_per_rank)))
