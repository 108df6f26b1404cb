"""Making the backend known to torch: its name, how to start without an address, its barrier."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch.distributed as dist

from mpizero import LaunchError
from mpizero.world.variables import ADDRESS, own
from mpizero_torch import runtime
from mpizero_torch.distributed.c10d import distributed_c10d, rendezvous
from mpizero_torch.distributed.choosing import make_default, takes_all
from mpizero_torch.distributed.process_group import MpiProcessGroup
from mpizero_torch.distributed.store import store_of

BACKEND = "mpizero"


def register() -> None:
    """Make ``init_process_group("mpizero")`` work. A second time it does nothing."""
    if BACKEND in dist.Backend.backend_list:
        return
    dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])
    make_default(BACKEND)
    handlers: dict[str, Any] = rendezvous["_rendezvous_handlers"]
    handlers["env"] = _through_mpi_or(handlers["env"])
    ours = _with_ours(distributed_c10d.monitored_barrier)
    distributed_c10d.monitored_barrier = dist.monitored_barrier = ours


def _create(options: Any, backend_options: Any) -> MpiProcessGroup:
    """What torch calls for every new group, on the ranks that are in it."""
    world = runtime.init()
    ranks = list(options.global_ranks_in_group)
    is_default = not ranks
    if is_default:
        if (options.group_rank, options.group_size) != (world.rank, world.size):
            raise LaunchError(
                f"init_process_group(): rank {options.group_rank} of {options.group_size} is what "
                f"torch was told, but MPI says rank {world.rank} of {world.size}. Start the job "
                "with mpirun or srun, all ranks of it in the process group, and leave rank, "
                "world_size and the variables RANK and WORLD_SIZE out."
            )
        ranks = list(range(world.size))
    part = world.subworld(ranks, in_order=True)
    if part is None:
        raise RuntimeError("torch has asked a rank that is not in the group to make it")
    return MpiProcessGroup(part, options.store, options.timeout, options.group_id)


def _through_mpi_or(stock: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A way to start from the environment that needs none of torch's variables in it."""

    def from_environment(
        url: str, timeout: timedelta = rendezvous["default_pg_timeout"], **options: Any
    ) -> Iterator[Any]:
        is_ours = own(os.environ).keys() >= {*ADDRESS}
        # A port alone is left over from something else: torch could do nothing with it.
        if not os.environ.get("MASTER_ADDR") or is_ours or takes_all():
            return _through_mpi(url, timeout)
        return stock(url, timeout=timeout, **options)

    return from_environment


def _through_mpi(url: str, timeout: timedelta) -> Iterator[Any]:
    world = runtime.init()
    given = parse_qs(urlparse(url).query)
    rank = int(given.get("rank", [world.rank])[0])
    size = int(given.get("world_size", [world.size])[0])
    yield store_of(world, timeout), rank, size


def _with_ours(stock: Callable[..., None]) -> Callable[..., None]:
    """torch's monitored barrier is for gloo by name; ours go to the group itself."""

    @functools.wraps(stock)
    def monitored_barrier(
        group: Any = None, timeout: Any = None, wait_all_ranks: bool = False
    ) -> None:
        found = dist.GroupMember.WORLD if group is None else group
        if isinstance(found, MpiProcessGroup):
            found.monitored_barrier(timeout, wait_all_ranks=wait_all_ranks)
        else:
            stock(group, timeout, wait_all_ranks)

    return monitored_barrier
