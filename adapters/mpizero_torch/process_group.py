"""What frameworks on ``torch.distributed`` find when they start: a process group, and torch's
variables. For the adapters to such frameworks.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from mpizero import LaunchError, World
from mpizero_torch.distributed import BACKEND, MpiProcessGroup
from mpizero_torch.distributed.store import store_of

TIMEOUT = timedelta(minutes=30)  # torch's own


def ensure_process_group(world: World, timeout: timedelta = TIMEOUT) -> None:
    """Make the default process group, of all ranks; where it is "mpizero" already, keep it.

    Collective. Whatever stands in ``MASTER_ADDR`` and its like is not asked: frameworks leave
    things there. Raises LaunchError where there is a process group with another backend.
    """
    with world.telling():
        if dist.is_initialized():
            if isinstance(dist.GroupMember.WORLD, MpiProcessGroup):
                return
            raise LaunchError(
                f"there is a process group already, with the backend {dist.get_backend()!r}. Leave "
                f"out init_process_group(), or call it with {BACKEND!r}."
            )
    store = store_of(world, timeout)
    dist.init_process_group(
        BACKEND, store=store, rank=world.rank, world_size=world.size, timeout=timeout
    )


def set_variables(world: World) -> None:
    """Say in the environment, as torchrun would, who this rank is. MPI's word counts, not what is
    there.
    """
    os.environ |= {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
    }


def keep_threads() -> None:
    """Keep torch's number of threads, which goes by the cores that this rank is bound to.

    Frameworks set another unless the variable is there: all cores that a rank may use, divided by
    the ranks of the node, which is too few where ranks are bound.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
