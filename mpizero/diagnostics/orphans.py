"""When the launcher's process is gone nobody ends the ranks any more: each ends itself.

Where somebody has killed it, or the kernel has, Open MPI's ranks train on, or wait for one another.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import suppress

from mpizero.diagnostics.siblings import launcher
from mpizero.world.abort import say_last

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
    threading.Thread(
        target=_wait, args=(handle, rank, above), name="mpizero-launcher", daemon=True
    ).start()


def _wait(handle: int, rank: int, above: int) -> None:
    ended = select.poll()  # select() cannot take handles above 1023
    ended.register(handle, select.POLLIN)
    with suppress(OSError):
        ended.poll()
        time.sleep(_GRACE_SECONDS)
        say_last(f"mpizero: rank {rank} ends, for its launcher (pid {above}) has ended.\n")
        os.kill(os.getpid(), signal.SIGKILL)
