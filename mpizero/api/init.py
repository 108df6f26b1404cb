"""``init``: from a launched process to a ``World``."""

from __future__ import annotations

import atexit
import os
import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING

from mpizero import diagnostics
from mpizero.api import reform
from mpizero.api.world import World
from mpizero.errors import ArgumentError, LaunchError
from mpizero.progress import finish_what_was_left
from mpizero.world import survival
from mpizero.world.abort import abort_if_failed, install_abort_hooks
from mpizero.world.children import guard_children, is_child
from mpizero.world.device import Device, bind_device
from mpizero.world.launcher import Launch, read_launch
from mpizero.world.segments import remove_segments, unname_segments
from mpizero.world.startup import load_mpi, start_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

# A World belongs to its communicator, and goes with that where nobody else has it.
_worlds: list[weakref.ref[World]] = []
_keyval: int | None = None  # under which a communicator knows its World, until it is freed
_device: Device | None = None


def init(
    comm: MPI.Intracomm | None = None, *, timeout: float | None = None, elastic: bool = False
) -> World:
    """Start MPI and return the World of all ranks, or of the ranks of an mpi4py communicator.

    Collective. Binds this rank's device first (GPU = local rank modulo visible GPUs), because some
    MPIs look for it when they start. Safe to call twice: the same World comes back. From here on
    an uncaught exception on one rank ends the whole job.

    ``timeout``: seconds that a rank may wait in a call before the job reports who waits for whom,
    and ends; by default what ``MPIZERO_TIMEOUT`` says, or 600. 0: for ever.

    ``elastic``: be ready to go on when ranks die, in functions under ``@elastic``. It needs an MPI
    that can do that (``mpirun --with-ft ulfm`` of Open MPI 5), and the first call to ask for it.
    When a rank has died, and the others have formed another World, that one comes back. There is no
    watchdog then: to it a death would be the end.

    Raises LaunchError when the launcher's ranks do not see each other, when no MPI library is
    found, in child processes of a rank, and for ``elastic`` where MPI cannot do it; ArgumentError
    for what is no intracommunicator, and for ``elastic`` after a call without it.
    """
    survivors = reform.current()
    if comm is None and survivors is not None:
        return survivors
    launch = read_launch(os.environ)
    _refuse_children(launch)
    device = _bind(launch)
    if elastic:
        survival.prepare()
    starts = comm is None and not load_mpi().Is_initialized()
    with diagnostics.starting(launch, timeout) if starts else nullcontext():
        try:
            return _start(launch, comm, device, timeout, elastic)
        except BaseException:
            if starts:
                remove_segments(os.getpid())
            raise


def _start(
    launch: Launch | None,
    comm: MPI.Intracomm | None,
    device: Device,
    timeout: float | None,
    elastic: bool,
) -> World:
    """Start MPI, if need be, and make the World of ``comm`` unless it has one."""
    guard_children(launch is not None)
    if comm is None:
        comm = start_mpi(launch)
    mpi = load_mpi()
    if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
        raise ArgumentError("init()", "comm", repr(comm), "None or an mpi4py intracommunicator")
    global _keyval
    if _keyval is None:
        _keyval = mpi.Comm.Create_keyval()
    world: World | None = comm.Get_attr(_keyval)
    if world is None or world.closed or elastic:
        if not _worlds and comm.size > 1:
            diagnostics.end_with_launcher(comm.rank)
        install_abort_hooks(comm)  # first: a rank that fails from here on must not be waited for
        others = bool(_open_worlds())
        world = reform.start(comm, device, others) if elastic else World(comm, device)
        unname_segments(world.node_comm)
        if not elastic:
            diagnostics.watch(world, timeout)
        diagnostics.trace_if_asked(world)
        if not _worlds:
            atexit.register(_leave, os.getpid())
        _worlds[:] = [weakref.ref(each) for each in (*_open_worlds(), world)]
        comm.Set_attr(_keyval, world)
    return world


def _open_worlds() -> list[World]:
    found = [each() for each in _worlds]
    return [world for world in found if world is not None and not world.closed]


def _bind(launch: Launch | None) -> Device:
    global _device
    if _device is None:
        _device = bind_device((launch.local_rank if launch else None) or 0)
    return _device


def _refuse_children(launch: Launch | None) -> None:
    if launch is not None and is_child():
        raise LaunchError(
            "init() was called in a child process of a rank (a DataLoader worker, for instance, "
            "which imports the training script again). Put what starts the training under "
            '`if __name__ == "__main__":`, so that importing the script does not run it.'
        )


def _leave(rank: int) -> None:
    """At the end of the process ``rank``; its forks leave the job alone."""
    if os.getpid() != rank:
        return
    diagnostics.recorder().leave()
    survivors = reform.current()
    for world in _open_worlds() + ([] if survivors is None else [survivors]):
        abort_if_failed(world.comm)
        world.finish()
    finish_what_was_left()
    diagnostics.stop_watching()
