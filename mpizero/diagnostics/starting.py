"""While MPI starts: a rank that does not come keeps the others in MPI_Init, where nothing ends it.

MPICH's launcher lets ranks wait for ever for one that has failed before it started MPI (for want of
a file, say), and every launcher for one that stands still there. There is no MPI yet to talk by.
So before it starts MPI a rank looks for those that the launcher has started on this node, which
takes no longer than MPI would wait for them; and where other nodes' are to come, a process watches
the clock: MPI_Init lets no thread of this one run.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from mpizero.diagnostics.process import STOPPED
from mpizero.diagnostics.siblings import Sibling, local_size, siblings
from mpizero.diagnostics.views import name
from mpizero.world.abort import say_last
from mpizero.world.launcher import Launch
from mpizero.world.segments import remove_segments

# Between looks, from the first on, each time half as long again.
_NAP_SECONDS, _LONGEST_NAP_SECONDS = 0.002, 0.2

# A rank that is not there must not be there for so long: the launcher may still be at work.
_CERTAIN_SECONDS = 2.0

# Programs load at different speeds: a short time for calls is none for the start.
_SHORTEST_TIMEOUT = 30.0

# The first rank that waits reports; the others leave it so long.
_GRACE_SECONDS = 1.5

_DRAIN_SECONDS = 0.5  # for the launcher to take what has been printed


@contextmanager
def watched_start(launch: Launch | None, timeout: float | None) -> Iterator[None]:
    """In here MPI starts, once all ranks of this node have come.

    Where one has ended, or has not come after ``timeout`` seconds (None: for ever; at least 30),
    says so, and ends the job. Does nothing for a process that was started alone.
    """
    if launch is None or launch.size == 1:
        yield
        return
    timeout = None if timeout is None else max(timeout, _SHORTEST_TIMEOUT)
    here = local_size()
    if here is not None:
        _await_siblings(launch, here, timeout)
    if timeout is None or here == launch.size:
        yield
        return
    with _clock(launch, timeout):
        yield


def _await_siblings(launch: Launch, expected: int, timeout: float | None) -> None:
    begun, nap = time.monotonic(), _NAP_SECONDS
    lacking_since: float | None = None
    while True:
        present = siblings()
        if (len(present) >= expected and all(each.has_come for each in present)) or not present:
            return
        now = time.monotonic()
        lacking_since = (lacking_since or now) if len(present) < expected else None
        is_late = timeout is not None and now - begun > timeout
        if lacking_since is not None and (is_late or now - lacking_since > _CERTAIN_SECONDS):
            gone = _ended(launch, present, expected)
            _end(launch, f"{gone} ended without calling init()", present)
        if is_late:
            _end(launch, _late(launch, now - begun), present)
        time.sleep(nap)
        nap = min(nap * 1.5, _LONGEST_NAP_SECONDS)


def _ended(launch: Launch, present: Sequence[Sibling], expected: int) -> str:
    """Who: by number if all ranks are of this node, which the launcher does not say otherwise."""
    if launch.size == expected:
        gone = sorted(set(range(expected)) - {each.rank for each in present})
        return f"{name(gone)} {'has' if len(gone) == 1 else 'have'}"
    count = expected - len(present)
    return f"{count} of the {expected} ranks of this node {'has' if count == 1 else 'have'}"


def _late(launch: Launch, seconds: float) -> str:
    return (
        f"rank {launch.rank} has waited for {seconds:.0f} s in init(), longer than MPIZERO_TIMEOUT "
        f"or init(timeout=) allow (there {_SHORTEST_TIMEOUT:g} s at least)"
    )


def _end(launch: Launch, title: str, present: Sequence[Sibling]) -> NoReturn:
    """Report, if this rank is the first of those who wait, and end the job."""
    come = [each.rank for each in present if each.has_come]
    if come[:1] == [launch.rank] or not come:
        lines = [f"mpizero: {title}. The job ends here."]
        lines += [f"  {name(come)} {'waits' if len(come) == 1 else 'wait'} in init()"] * bool(come)
        for each in present:
            if not each.has_come:
                stopped = " and is stopped (by a signal or a debugger)" * (each.state == STOPPED)
                who = f"rank {each.rank} (pid {each.pid})"
                lines.append(f"    missing: {who} has not called init(){stopped}")
        say_last("".join(f"{line}\n" for line in lines))
    else:
        time.sleep(_GRACE_SECONDS)
    sys.stdout.flush()
    for each in present:  # it may have started MPI by now
        remove_segments(each.pid)
    _kill(os.getpid())


def _kill(pid: int) -> NoReturn:
    """By a signal: MPICH's launcher lets a rank exit that has not started MPI, as if it had."""
    os.kill(pid, signal.SIGKILL)
    os._exit(1)


@contextmanager
def _clock(launch: Launch, timeout: float) -> Iterator[None]:
    """A process that ends this one if what is done meanwhile takes too long."""
    host = socket.gethostname()
    said = f"mpizero: {_late(launch, timeout)}, on {host}. The job ends here.\n"
    parent, begun = os.getpid(), time.monotonic()
    with warnings.catch_warnings():
        # Of threads, which the child has none of, and does not wait for.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            while time.monotonic() - begun < timeout:
                time.sleep(min(0.2, timeout))
                if os.getppid() != parent:
                    os._exit(0)
            os.write(2, said.encode())
            time.sleep(_DRAIN_SECONDS)
            remove_segments(parent)
            _kill(parent)
        finally:
            os._exit(0)
    try:
        yield
    finally:
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
