"""This process's recorder and watchdog: one of each, whatever worlds it is in."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TextIO, TypeVar

from mpizero.diagnostics import stacks, watchdog
from mpizero.diagnostics.between_nodes import OtherNodes
from mpizero.diagnostics.clocks import offset_to_root
from mpizero.diagnostics.node import NodeRecords
from mpizero.diagnostics.orphans import abort
from mpizero.diagnostics.recorder import Recorder
from mpizero.diagnostics.starting import watched_start
from mpizero.diagnostics.trace import Tracer, open_file
from mpizero.diagnostics.watchdog import Watchdog
from mpizero.errors import ArgumentError

if TYPE_CHECKING:
    from mpizero.world import Group
    from mpizero.world.launcher import Launch

DEFAULT_TIMEOUT = 600.0

P = ParamSpec("P")
R = TypeVar("R")

_recorder: Recorder | None = None
_watchdog: Watchdog | None = None
_tracer: Tracer | None = None


def recorder() -> Recorder:
    """This process's."""
    global _recorder
    if _recorder is None:
        _recorder = Recorder(0, 1)
    return _recorder


def spanned(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: what the function does is a span of this name."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            with recorder().span(name):
                return function(*args, **kwargs)

        return inside

    return decorate


def starting(launch: Launch | None, timeout: float | None) -> AbstractContextManager[None]:
    """A context for the start of MPI, up to ``watch``, which gets the same ``timeout``."""
    recorder()  # shows that this process has come
    return watched_start(launch, seconds_of(timeout))


def watch(group: Group, timeout: float | None) -> None:
    """Start the watchdog over this rank, one of the job's ``group``. Collective; once.

    ``timeout``: seconds that a call may wait; None: what ``MPIZERO_TIMEOUT`` says, or 600; 0: for
    ever. Said again later, it replaces what was said.
    """
    global _watchdog
    seconds = seconds_of(timeout)
    if _watchdog is not None:
        if timeout is not None:
            _watchdog.timeout = seconds
        return
    if group.size == 1:
        return
    own = recorder()
    own.place(group.rank, group.size, group.node_index, group.comm.bcast(time.time_ns()))
    stacks.install(own.fd)
    node = NodeRecords.gather(group.node_comm, group.rank, own.record, own.fd)
    others = None
    if group.node_count > 1 and group.thread_level == "multiple":
        others = OtherNodes(group.comm, group.nodes, node)
    _watchdog = Watchdog(own, node, others, seconds, partial(abort, group.comm))
    _watchdog.start()


def when_late(task: Callable[[], None]) -> None:
    """Do ``task`` when a call of this rank has been open for a moment, again and again.

    It is done by a thread of its own, and must not wait.
    """
    watchdog.when_late.append(task)


def waits_for_at_most() -> float | None:
    """How long a call may wait, in seconds; None: for ever."""
    return seconds_of(None) if _watchdog is None else _watchdog.timeout


@contextmanager
def trace(group: Group, folder: str | Path) -> Iterator[None]:
    """Write a timeline of this rank into ``folder`` meanwhile. Collective over ``group``."""
    _start_trace(group, Path(folder))
    try:
        yield
    finally:
        _stop_trace()


def trace_if_asked(group: Group) -> None:
    """From now on, if ``MPIZERO_TRACE`` names a folder. Collective."""
    folder = os.environ.get("MPIZERO_TRACE")
    if folder and _tracer is None:
        _start_trace(group, Path(folder))


def _start_trace(group: Group, folder: Path) -> None:
    global _tracer
    if _tracer is not None:
        raise ArgumentError("trace()", "folder", repr(str(folder)), "one trace at a time")
    file = _open_together(group, folder)
    offset = offset_to_root(group)
    origin = group.comm.bcast(time.monotonic_ns())
    _tracer = recorder().listener = Tracer(file, group.rank, group.size, offset, origin)


def _open_together(group: Group, folder: Path) -> TextIO:
    """Every rank's file of a trace; where one cannot be had, all ranks raise its error."""
    file, refusal = None, None
    try:
        file = open_file(folder, group.rank)
    except ArgumentError as error:
        refusal = error.given, error.allowed
    refusals = group.comm.allgather(refusal)
    first = next((rank for rank, each in enumerate(refusals) if each is not None), None)
    if file is not None and first is None:
        return file
    if file is not None:
        file.close()
    given, allowed = refusals[first or 0]
    where = f" (rank {first})" if group.size > 1 else ""
    failure = ArgumentError("trace()", "folder", given + where, allowed)
    failure.reported_elsewhere = first != group.rank
    raise failure


def _stop_trace() -> None:
    global _tracer
    if _tracer is not None:
        recorder().listener = None
        _tracer.close()
        _tracer = None


def stop_watching() -> None:
    """This rank has come to its end, with MPI's to follow."""
    global _watchdog
    _stop_trace()
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None


def seconds_of(timeout: float | None) -> float | None:
    """How long a call may wait; None: for ever. Raises ArgumentError for what is no time."""
    name, given = "timeout", timeout
    if timeout is None:
        name, text = "MPIZERO_TIMEOUT", os.environ.get("MPIZERO_TIMEOUT", "")
        try:
            given = float(text) if text else DEFAULT_TIMEOUT
        except ValueError:
            raise ArgumentError("init()", name, repr(text), "seconds, or 0 for ever") from None
    if given is None or not isfinite(given) or given < 0:
        raise ArgumentError("init()", name, repr(given), "seconds >= 0, 0 for ever")
    return given or None
