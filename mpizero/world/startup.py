"""Starting MPI: in the right order, with the thread level that overlap needs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mpizero.errors import ArgumentError, LaunchError
from mpizero.world.launcher import Launch, refuse_singleton
from mpizero.world.segments import noted

if TYPE_CHECKING:
    from mpi4py import MPI

_LEVELS = ("single", "funneled", "serialized", "multiple")


def start_mpi(launch: Launch | None) -> MPI.Intracomm:
    """Start MPI (unless it runs already) and return COMM_WORLD.

    ``MPIZERO_THREAD_LEVEL`` asks for another thread level than "multiple" (MPI 4.1, section
    11.6): with less, communication is not overlapped by a thread. Raises LaunchError when no MPI
    library can be loaded, MPI was finalised already, or a launcher's ranks do not see each other.
    """
    mpi = load_mpi()
    if mpi.Is_finalized():
        raise LaunchError("init(): MPI was finalised already; it cannot start twice in a process.")
    if not mpi.Is_initialized():
        level = _wanted_level(mpi)
        with noted():
            mpi.Init_thread(level)
    world: MPI.Intracomm = mpi.COMM_WORLD
    if world.size == 1:
        refuse_singleton(launch, os.environ, mpi.Get_library_version())
    return world


def load_mpi() -> Any:
    """Import mpi4py.MPI without starting MPI; LaunchError with the remedy if there is none."""
    import mpi4py

    mpi4py.rc.initialize = False
    # None would mean "only if mpi4py initialised": our MPI must be finalised at exit as well.
    mpi4py.rc.finalize = True
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"init(): mpi4py could not load an MPI library ({error}). Load your site's MPI module "
            "and build mpi4py against it (pip install --no-binary=mpi4py mpi4py), or take the "
            "embedded one: pip install 'mpizero[mpich]'."
        ) from error
    return MPI


def thread_level() -> str:
    """The thread level that MPI granted: "single", "funneled", "serialized" or "multiple"."""
    mpi = load_mpi()
    return next(name for name in _LEVELS if getattr(mpi, f"THREAD_{name.upper()}") == _query(mpi))


def _query(mpi: Any) -> int:
    return int(mpi.Query_thread())


def _wanted_level(mpi: Any) -> int:
    name = os.environ.get("MPIZERO_THREAD_LEVEL", "multiple").lower()
    if name not in _LEVELS:
        raise ArgumentError("init()", "MPIZERO_THREAD_LEVEL", repr(name), ", ".join(_LEVELS))
    return int(getattr(mpi, f"THREAD_{name.upper()}"))
