"""Python stacks of a process that may not be able to show them itself.

Asked, the rank's own watchdog answers for all threads: it holds Python's lock while it looks, so
that none of them moves. A rank that does not answer is in C code that keeps the lock; a signal
then makes faulthandler write the stack of the main thread, from within a handler in C. Only that
one: the handler reads without the lock, and the frames of a thread that runs meanwhile may go while
they are read (which has crashed the process that was asked). A stopped process takes both when it
is let run for a moment.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress

from mpizero.diagnostics.process import GONE, STOPPED, state_of
from mpizero.diagnostics.record import AT_STACK_READ, STACK_BYTES, STACK_START, Record

# The signal that asks for the main thread's stack, and by `kill -USR2` for a report.
ASK = getattr(signal, "SIGUSR2", None)

# Watchdogs look twice a second whether they are asked.
_PATIENCE_SECONDS, _NAP_SECONDS = 1.5, 0.02
_QUIET_NAPS = 3  # what a signal has brought is complete when nothing has come for so many naps

_FROM_OUTSIDE = "MainThread (it holds Python's lock, so that the others cannot be seen):"


def install(fd: int) -> None:
    """Write the main thread's stack to ``fd`` at the signal, and all to stderr in a crash.

    A handler that the program has for the signal is called too.
    """
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError, RuntimeError):  # stderr is no file
            faulthandler.enable()
    if ASK is not None:
        has_handler = callable(signal.getsignal(ASK))
        faulthandler.register(ASK, fd, all_threads=False, chain=has_handler)


def answer(record: Record) -> None:
    """If this process has been asked for its stacks, write them down. By its watchdog's thread."""
    number = record.asked
    if number:
        record.give_answer(number, _of_all_threads())


def collect(records: Sequence[Record | None], *, wake: bool = False) -> list[str]:
    """The stacks of these processes; "" for those that give none.

    ``wake``: let stopped ones run for the moment that this takes.
    """
    states = [GONE if record is None else state_of(record.pid) for record in records]
    asked: dict[int, Record] = {}
    for at, (record, state) in enumerate(zip(records, states, strict=True)):
        if record is not None and state != GONE and (wake or state != STOPPED):
            asked[at] = record
    started = {at: record.stack_end for at, record in asked.items()}
    numbers = {at: record.ask() for at, record in asked.items()}
    woken = [record.pid for at, record in asked.items() if states[at] == STOPPED]
    for pid in woken:
        _signal(pid, signal.SIGCONT)
    found = _wait_for_answers(asked, numbers)
    silent = {at: record for at, record in asked.items() if at not in found}
    found |= _ask_main_threads(silent, started)
    for pid in woken:
        _signal(pid, signal.SIGSTOP)
    for record in asked.values():  # whoever asked by a signal is being answered
        record.header[AT_STACK_READ] = record.stack_end
    return [found.get(at, "") for at in range(len(records))]


def _wait_for_answers(asked: Mapping[int, Record], numbers: Mapping[int, int]) -> dict[int, str]:
    found: dict[int, str] = {}
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while len(found) < len(asked) and time.monotonic() < deadline:
        for at, record in asked.items():
            if record.pid == os.getpid():
                answer(record)
            said = record.answer(numbers[at])
            if said is not None:
                found[at] = said
        if len(found) < len(asked):
            time.sleep(_NAP_SECONDS)
    return found


def _ask_main_threads(silent: Mapping[int, Record], started: Mapping[int, int]) -> dict[int, str]:
    for record in silent.values():
        _ask(record.pid)
    deadline, quiet = time.monotonic() + _PATIENCE_SECONDS, 0
    ends = dict(started)
    while silent and time.monotonic() < deadline and quiet < _QUIET_NAPS:
        time.sleep(_NAP_SECONDS)
        now = {at: record.stack_end for at, record in silent.items()}
        came = all(end > started[at] for at, end in now.items())
        quiet = quiet + 1 if came and now == ends else 0
        ends = now
    found = {}
    for at, record in silent.items():
        _, _, stack = record.stacks(started[at], ends[at]).partition("\n")  # its title
        if stack.strip():
            found[at] = f"{_FROM_OUTSIDE}\n{stack.rstrip()}"
    return found


def _of_all_threads() -> str:
    """All threads but the one that looks, as faulthandler would write them."""
    own = threading.get_ident()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident == own:
            continue
        lines = [f"{names.get(ident, 'a thread that Python did not start')}:"]
        for each, line in traceback.walk_stack(frame):
            code = each.f_code
            lines.append(f'  File "{code.co_filename}", line {line} in {code.co_name}')
        parts.append("\n".join(lines))
    return "\n".join(sorted(parts, key=lambda part: not part.startswith("MainThread:")))


def start_over(record: Record, fd: int) -> None:
    """Where much has been written: begin again at the start. For the process itself."""
    end = record.stack_end
    if end > STACK_BYTES // 2:
        os.lseek(fd, STACK_START, os.SEEK_SET)
        record.header[AT_STACK_READ] = 0
        record.memory[STACK_START : STACK_START + end] = bytes(end)


def _ask(pid: int) -> None:
    if ASK is not None:
        _signal(pid, ASK)


def _signal(pid: int, number: int) -> None:
    with suppress(OSError):
        os.kill(pid, number)
