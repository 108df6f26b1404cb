"""The World of a job that survives deaths: those who are left form another in its place."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING

from mpizero.api.world import World
from mpizero.errors import ArgumentError
from mpizero.world import holdings, survival
from mpizero.world.abort import end_quietly
from mpizero.world.device import Device

if TYPE_CHECKING:
    from mpi4py import MPI

_current: World | None = None


def start(comm: MPI.Intracomm, device: Device, others: bool) -> World:
    """The first World of a job that survives deaths. Collective.

    ``others``: there are Worlds already, which could not be revoked. Raises LaunchError where the
    MPI cannot do it.
    """
    global _current
    if others:
        raise ArgumentError(
            "init()", "elastic", "True, after a call without it", "True in the first call",
        )  # fmt: skip
    lifeline = survival.start(comm)
    _current = World(comm if lifeline is None else lifeline.base, device)
    _know_peers(_current)
    return _current


def current() -> World | None:
    """The World of those who are left; None in a job that does not survive deaths."""
    return None if _current is None or _current.closed else _current


def finished(error: BaseException | None) -> bool:
    """Have all survivors come to the end? To be called by all: at the end, or with a death.

    Where it is not so ``reform`` is to follow. Does not come back where a rank has failed of an
    error of its own, which ends the job.
    """
    lifeline = survival.lifeline()
    if lifeline is None:
        return error is None
    well = error is None and not lifeline.broken
    if not well:
        lifeline.revoke()
    flags = survival.NOBODY_FAILED | (survival.FINISHED if well else 0)
    agreed = lifeline.agree(flags)
    if not agreed & survival.NOBODY_FAILED:
        end_quietly()
    return bool(agreed & survival.FINISHED)


def reform() -> World:
    """Make a World of the survivors, in the order of their ranks. Collective over them.

    The old one is abandoned; ``init()`` gives the new one from here on. Raises RankDiedError if a
    rank dies meanwhile: then ``finished`` and ``reform`` are to be called again.
    """
    global _current
    lifeline, old = survival.lifeline(), _current
    if lifeline is None or old is None:
        raise RuntimeError("there is nobody who could have died")
    device, awareness, before = old.device, old.cuda_awareness, old.size
    old.abandon(lifeline.died())
    holdings.forget_all()
    lifeline = survival.use(lifeline.shrink())
    gc.collect()  # what the old world's arrays held
    try:
        _current = World(lifeline.base, device, awareness)
        _know_peers(_current)
    except Exception as error:
        raise survival.translated(error) from error
    if _current.rank == 0:
        print(
            f"[mpizero] {before - _current.size} of {before} ranks died: "
            f"going on with {_current.size}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return _current


def _know_peers(world: World) -> None:
    lifeline = survival.lifeline()
    if lifeline is not None:
        pids = world.node_comm.allgather(os.getpid())
        lifeline.know_peers(pids, world.node_count > 1)
