"""Neither outlives the other: ranks whose launcher has gone, a launcher whose ranks have.

Where somebody has killed it, or the kernel has, Open MPI's ranks train on, or wait for one another.
And where a node does not answer any more, launchers wait for ever for the end of the ranks there.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mpizero.diagnostics import threads
from mpizero.diagnostics.process import parent_of
from mpizero.diagnostics.siblings import launcher
from mpizero.world.abort import say_last

if TYPE_CHECKING:
    from mpi4py import MPI

# How launchers' processes are called that live for one job (daemons may serve several).
_NAMES = ("mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "prterun", "orterun")

THREAD = "mpizero-launcher"  # the name of the thread that waits for its end

_PATIENCE_SECONDS = 4  # that a launcher has to end after MPI_Abort

_GRACE_SECONDS = 0.5  # for what the launcher itself has sent before it ended


def end_with_launcher(rank: int) -> None:
    """From now on this process ends when the launcher's has. Costs a thread that sleeps.

    Does nothing where the launcher cannot be seen, or the system does not tell of its end.
    """
    above = launcher()
    if above is None:
        return
    try:
        handle = os.pidfd_open(above)
    except (AttributeError, OSError):  # not Linux, or one before 5.3
        return
    threading.Thread(target=_wait, args=(handle, rank, above), name=THREAD, daemon=True).start()


def abort(comm: MPI.Intracomm, status: int) -> None:
    """End the job, and also a launcher that does not end with it.

    By a process of its own, for none of the ranks here is left by then.
    """
    pids, above = [], launcher() or 0
    while above > 1 and _name_of(above) in _NAMES:
        pids.append(str(above))
        above = parent_of(above)
    if pids:
        naps = (
            f"for nap in $(seq {_PATIENCE_SECONDS}); do sleep 1; kill -0 {pids[-1]} || exit; done"
        )
        with suppress(OSError):
            subprocess.Popen(  # it inherits nothing by which launchers see that a rank is there
                ["/bin/sh", "-c", f"{naps}; kill -9 {' '.join(pids)}"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
    comm.Abort(status)


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _wait(handle: int, rank: int, above: int) -> None:
    ended = select.poll()  # select() cannot take handles above 1023
    ended.register(handle, select.POLLIN)
    threads.serve()
    with suppress(OSError):
        ended.poll()
        time.sleep(_GRACE_SECONDS)
        say_last(f"mpizero: rank {rank} ends, for its launcher (pid {above}) has ended.\n")
        os.kill(os.getpid(), signal.SIGKILL)
