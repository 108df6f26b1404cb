"""Python stacks of a process that may not be able to show them itself.

faulthandler writes the stacks of all threads from within a signal handler in C: also while the
process is in an endless loop, or in C code that holds Python's lock. A stopped process takes the
signal when it is let run for a moment.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress

from mpizero.diagnostics.process import is_stopped
from mpizero.diagnostics.record import AT_STACK_READ, STACK_BYTES, STACK_START, Record

# The signal that asks for stacks, and by `kill -USR2` for a report.
ASK = getattr(signal, "SIGUSR2", None)

_PATIENCE_SECONDS, _NAP_SECONDS = 2.0, 0.02
_QUIET_NAPS = 3  # a stack is complete when nothing has come for so many naps


def install(fd: int) -> None:
    """Write this process's stacks to ``fd`` whenever it is asked to, and when it crashes.

    A handler that the program has for the signal is called too.
    """
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError, RuntimeError):  # stderr is no file
            faulthandler.enable()
    if ASK is not None:
        has_handler = callable(signal.getsignal(ASK))
        faulthandler.register(ASK, fd, all_threads=True, chain=has_handler)


def collect(records: Sequence[Record | None], *, wake: bool = False) -> list[str]:
    """The stacks of these processes; "" for those that give none.

    ``wake``: let stopped ones run for the moment that this takes.
    """
    started = [0 if record is None else record.stack_end for record in records]
    stopped = [record is not None and is_stopped(record.pid) for record in records]
    asked = [
        None if record is None or (is_still and not wake) else record
        for record, is_still in zip(records, stopped, strict=True)
    ]
    for record, is_still in zip(asked, stopped, strict=True):
        if record is not None:
            _ask(record.pid)
            if is_still:
                _signal(record.pid, signal.SIGCONT)
    deadline, quiet = time.monotonic() + _PATIENCE_SECONDS, 0
    ends = list(started)
    while time.monotonic() < deadline and quiet < _QUIET_NAPS:
        time.sleep(_NAP_SECONDS)
        now = [0 if record is None else record.stack_end for record in asked]
        came = all(
            record is None or end > start
            for record, end, start in zip(asked, now, started, strict=True)
        )
        quiet = quiet + 1 if came and now == ends else 0
        ends = now
    found = []
    for record, is_still, start, end in zip(asked, stopped, started, ends, strict=True):
        if record is None:
            found.append("")
            continue
        if is_still:
            _signal(record.pid, signal.SIGSTOP)
        found.append(record.stacks(start, end).strip())
        record.header[AT_STACK_READ] = end
    return found


def start_over(record: Record, fd: int) -> None:
    """Where much has been written: begin again at the start. For the process itself."""
    end = record.stack_end
    if end > STACK_BYTES // 2:
        os.lseek(fd, STACK_START, os.SEEK_SET)
        record.header[AT_STACK_READ] = 0
        record.memory[STACK_START : STACK_START + end] = bytes(end)


def without_ours(stack: str) -> str:
    """A dump less the threads that watch, and the addresses by which it names threads."""
    threads = re.split(r"\n\s*\n", stack)
    kept = [each for each in threads if "diagnostics/watchdog.py" not in each]
    text = "\n".join(kept)
    return re.sub(r"(Current thread|Thread) 0x[0-9a-f]+", "Thread", text)


def _ask(pid: int) -> None:
    if ASK is not None:
        _signal(pid, ASK)


def _signal(pid: int, number: int) -> None:
    with suppress(OSError):
        os.kill(pid, number)
