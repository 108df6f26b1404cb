"""One rank fails: the whole job ends, and one readable traceback tells why.

An uncaught exception on one rank leaves the others waiting in MPI for ever. So the interpreter's
last-resort hook prints the traceback, prefixed with the rank, and calls MPI_Abort
(MPI 4.1, section 9.7), which every launcher turns into the end of all ranks.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import gc
import hashlib
import io
import os
import re
import socket
import sys
import time
import traceback
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from mpizero.world.survival import lifeline

if TYPE_CHECKING:
    from mpi4py import MPI

# Ranks that raise an error which another rank reports leave it 2 s to print and abort. In naps: a
# machine that stood still for a moment has taken one of them, not the reporting rank's whole time.
_GRACE_NAPS, _NAP_SECONDS = 40, 0.05

# Both launchers have dropped what a rank wrote just before it aborted.
_DRAIN_SECONDS = 0.5

_exit_status: int = 0
_expected_status: int | None = None
_installed = _knows_forks = False
_stock_exit = os._exit
_HELD = "_mpizero_end_of_a_child"  # in sys, which Python takes apart last
_claims: list[socket.socket] = []  # held until this process ends


def install_abort_hooks(comm: MPI.Intracomm) -> None:
    """End all ranks of ``comm`` when this one dies of an exception or a non-zero ``sys.exit``.

    Does nothing for a single rank (Python's own behaviour is right there, but for its forks) or the
    second time.
    """
    global _installed, _knows_forks
    if not _knows_forks:
        _knows_forks = True
        os.register_at_fork(after_in_child=_end_as_a_child)
    if _installed or comm.size == 1:
        return
    _installed = True
    python_excepthook = sys.excepthook

    own_process = os.getpid()

    def end_job(
        kind: type[BaseException], error: BaseException, where: TracebackType | None
    ) -> None:
        if os.getpid() != own_process:  # a forked child's error is its own
            python_excepthook(kind, error, where)
            return
        if _program_goes_on():
            _report(comm.rank, kind, error, where, is_last=False)
            return
        if issubclass(kind, KeyboardInterrupt):  # Ctrl-C reaches every rank; the launcher ends all
            python_excepthook(kind, error, where)
        else:
            _report(comm.rank, kind, error, where)
        _end_all(comm, 1)

    sys.excepthook = end_job
    _watch_exit_status()
    _watch_quick_exit(comm)


def abort_if_failed(comm: MPI.Intracomm) -> None:
    """At exit: turn a non-zero ``sys.exit(status)`` of this rank into the end of the job."""
    if _exit_status not in (0, _expected_status):
        sys.stdout.flush()
        say_last(f"[rank {comm.rank}] exited with status {_exit_status}; ending the job\n")
        _end_all(comm, _exit_status)


def end_quietly(status: int = 1) -> NoReturn:
    """End this process at once, where another has told why, or no other is left to be told.

    Under ULFM not by MPI_Abort: its launcher may then return 0, or never.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def say_last(text: str) -> None:
    """Print what the job ends for, and let the launcher have it before the job ends."""
    stream = sys.stderr
    if isinstance(stream, io.StringIO) and sys.__stderr__ is not None:
        # torch's hook, put before ours by init_process_group(), collects what we print and shows it
        # when we return. We do not, or the launcher is quicker.
        stream = sys.__stderr__
    with suppress(OSError, ValueError):  # nobody listens any more
        stream.write(text)  # one write, so that other ranks' output does not cut in
        stream.flush()
    time.sleep(_DRAIN_SECONDS)


def expect_exit(status: int) -> None:
    """All ranks are about to ``sys.exit(status)``: none of them has failed by that."""
    global _expected_status
    _expected_status = status


def _program_goes_on() -> bool:
    """Has the program itself called the hook, as an interactive shell does to show an error?

    When the program has died of an error nothing is left of it but hooks.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name == "<module>" or frame.f_globals.get("__name__") == "runpy"


def _end_all(comm: MPI.Intracomm, status: int) -> None:
    survives = lifeline()
    if survives is not None:
        survives.end()
        end_quietly(status)
    comm.Abort(status)


def _report(
    rank: int,
    kind: type[BaseException],
    error: BaseException,
    where: TracebackType | None,
    *,
    is_last: bool = True,
) -> None:
    text = "".join(traceback.format_exception(kind, error, where))
    is_told = getattr(error, "reported_elsewhere", False)
    if is_told or (is_last and not _is_first_to_say(text)):
        # The reporting rank prints the same error and ends the job, unless it has caught it.
        for _ in range(_GRACE_NAPS):
            time.sleep(_NAP_SECONDS)
    sys.stdout.flush()
    lines = "".join(f"[rank {rank}] {line}\n" for line in text.rstrip().splitlines())
    say_last(lines)


def _is_first_to_say(text: str) -> bool:
    """Has no other rank of this node begun to say the same? A wrong argument is wrong on all.

    Who says it holds a name that only one process of a node can hold, and that goes with it: of
    the ranks that the same launcher's process has started.
    """
    same = re.sub(r"\brank \d+", "rank", text)
    name = hashlib.sha256(f"{os.getppid()} {same}".encode()).hexdigest()[:32]
    try:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        _claims.append(claim)
        claim.bind(f"\0mpizero-says-{name}")  # in Linux' own name space: no file
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    except AttributeError:  # a system without such sockets
        return True
    return True


def _watch_exit_status() -> None:
    """Remember the status that a SystemExit ends the interpreter with.

    It passes no hook, however it has been raised, and at exit Python no longer tells the status.
    But the interpreter asks the exception for its ``code``, and a handler that catches it (a shell
    for notebooks, a debugger) asks from Python code, if at all. So ``code`` is looked up by us. The
    class is of C: its attributes are to be had by way of what its read-only dictionary refers to.
    """
    stock = SystemExit.__dict__["code"]
    attributes: Any = next(iter(gc.get_referents(SystemExit.__dict__)), None)
    modified: Any = getattr(getattr(ctypes, "pythonapi", None), "PyType_Modified", None)
    is_open = isinstance(attributes, dict) and modified is not None  # as CPython's classes are

    def code(error: SystemExit) -> Any:
        global _exit_status
        status = stock.__get__(error)
        if sys._getframe().f_back is None:  # asked by no Python code: nobody has caught it
            _exit_status = _as_number(status)
        return status

    if is_open:
        attributes["code"] = property(code, stock.__set__, stock.__delete__, stock.__doc__)
        modified(ctypes.py_object(SystemExit))  # which remembers look-ups

    def leave(status: Any = None, /) -> NoReturn:
        global _exit_status
        if not is_open:  # what is known is that somebody has asked for it
            _exit_status = _as_number(status)
        raise SystemExit(status)

    sys.exit = leave  # of C: up to Python 3.11 there is no exception yet to ask, only the status


def _watch_quick_exit(comm: MPI.Intracomm) -> None:
    """``os._exit`` runs nothing at exit, and launchers differ in what they make of it.

    MPICH's ends the others, with status 0 if this rank's was: a job that did half of its work
    would count as done. Where deaths are survived it is one of them.
    """
    leave, pid = os._exit, os.getpid()

    def end_job(status: int) -> NoReturn:
        if os.getpid() == pid and lifeline() is None:  # a forked child may leave as it likes
            say_last(f"[rank {comm.rank}] left by os._exit({status}); ending the job\n")
            comm.Abort(status or 1)
        leave(status)

    os._exit = end_job


class _EndOfAChild:
    """Ends the process when Python takes its own modules apart, nearly the last that it does.

    What comes then is MPI's own end, which mpi4py adds to Python's. It concerns all ranks: in the
    fork of one, Open MPI waits for it for ever.
    """

    def __init__(self) -> None:
        self._leave, self._status = os._exit, 0
        self._before = getattr(sys, "last_value", None)  # what an interpreter notes that it died of

    def note_status(self) -> None:
        """At exit, while it can be told."""
        has_failed = getattr(sys, "last_value", None) is not self._before
        self._status = _exit_status or int(has_failed)

    def __del__(self) -> None:
        self._leave(self._status)


def _end_as_a_child() -> None:
    """A fork of a rank is none."""
    os._exit = _stock_exit
    if _HELD not in vars(sys):  # else it is the fork of a fork
        if not _installed:
            _watch_exit_status()
        vars(sys)[_HELD] = end = _EndOfAChild()
        atexit.register(end.note_status)


def _as_number(status: Any) -> int:
    if status is None:
        return 0
    return status if isinstance(status, int) else 1
