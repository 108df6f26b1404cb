"""Who carries asynchronous operations out, always in the order in which they were submitted.

That order is the same on every rank (each submits the same operations), so operations match
without names or negotiation. With a thread, communication overlaps compute. Without one, the
operations run when the first handle is waited for: where every core is busy computing, a thread
that spins in MPI would only take cycles away. But what a rank has submitted must not wait for what
the rank itself waits for: another rank may need the one before it does its part of the other. So
when a thread waits, for another World's operations or for long, a thread gets what is pending.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mpizero.diagnostics import Lane, recorded, serve, when_late
from mpizero.errors import ArgumentError
from mpizero.progress.handle import Handle, Order
from mpizero.world import shared_cores
from mpizero.world.group import Group

# Whose World has been let go of, while something was under way.
_leaving: weakref.WeakSet[Worker] = weakref.WeakSet()


# That have operations which nobody carries out yet.
_idle: weakref.WeakSet[Worker] = weakref.WeakSet()


def hand_over(but: Worker | None = None) -> None:
    """The program waits: whatever is pending goes on beside it, where MPI allows that."""
    for worker in [*_idle]:
        if worker is not but:
            worker.hand_over()


when_late(hand_over)


def finish_what_was_left() -> None:
    """At exit: carry out what is under way in what has been let go of."""
    for worker in [*_leaving]:
        worker.close()


def overlaps(group: Group, wanted: bool = False) -> bool:
    """True if asynchronous operations of ``group`` should run on a thread.

    That needs MPI_THREAD_MULTIPLE, and a core for it beside each rank's compute, unless it is
    ``wanted`` anyhow. ``MPIZERO_PROGRESS=thread|inline|auto`` decides otherwise.
    """
    wish = os.environ.get("MPIZERO_PROGRESS", "auto")
    if wish not in ("auto", "thread", "inline"):
        raise ArgumentError("init()", "MPIZERO_PROGRESS", repr(wish), "auto, thread, inline")
    possible = group.thread_level == "multiple"
    if wish == "thread" and not possible:
        raise ArgumentError(
            "init()",
            "MPIZERO_PROGRESS",
            "'thread'",
            "auto or inline",
            f"This MPI grants thread level '{group.thread_level}'; a thread needs 'multiple'.",
        )
    wanted = wanted or has_core(group)
    return possible and (wish == "thread" or (wish == "auto" and wanted))


def has_core(group: Group) -> bool:
    """Is there a core for a thread beside each rank's compute?"""
    return bool(group.cores_per_rank >= 2)


class Worker:
    """Carries out operations one after the other, on a thread or when they are waited for."""

    def __init__(
        self,
        threaded: bool,
        on_start: Callable[[], None],
        waiting: Lane,
        in_order: bool,
        has_core: bool,
        may_thread: bool = False,
    ) -> None:
        self.threaded = threaded
        self._may_thread = may_thread
        self._has_thread = threaded  # or has got one since
        self._has_core = has_core  # the thread, beside the compute
        self._in_order = in_order
        # Held by the thread that carries operations out; what it carries out may call for others.
        self._turn = threading.RLock()
        self._unfinished: set[Handle] = set()
        self._on_start = on_start
        self._waiting = waiting
        self._thread: threading.Thread | None = None
        self._submitted: queue.SimpleQueue[Handle | None] = queue.SimpleQueue()
        self._pending: deque[Handle] = deque()

    def submit(self, work: Callable[[], Any], what: str, order: Order | None = None) -> Handle:
        """Queue ``work``, which is described by ``what``, and return its handle."""
        handle = Handle(work, self._advance, self._block, what, order)
        if self._in_order:
            self._unfinished.add(handle)
        if self._has_thread:
            self._start()
            self._submitted.put(handle)
        else:
            self._pending.append(handle)
            _idle.add(self)
        return handle

    def hand_over(self) -> None:
        """From here on a thread carries operations out, those that are pending first."""
        if not self._may_thread or self._has_thread or not self._pending:
            return
        self._has_thread = True
        _idle.discard(self)
        while (handle := self._next_pending()) is not None:
            self._submitted.put(handle)
        self._start()

    def _next_pending(self) -> Handle | None:
        with suppress(IndexError):
            return self._pending.popleft()
        return None

    def take_turn(self) -> bool:
        """For a blocking operation between asynchronous ones: may it be carried out at once?

        If so, on the calling thread, and ``give_turn`` is to follow.
        """
        return not self._unfinished and self._turn.acquire(blocking=False)

    def give_turn(self) -> None:
        self._turn.release()

    def run_in_order(self, work: Callable[[], Any], what: str) -> Any:
        """Carry a blocking operation out after all that have been submitted; return its result."""
        if self.take_turn():
            try:
                return work()
            finally:
                self.give_turn()
        if threading.current_thread() is self._thread:  # called by what a handle has set off
            self._catch_up()
            return work()
        return self.submit(work, what).wait()

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        while self._run_next():
            pass
        if self._thread is not None:
            self._submitted.put(None)
            self._thread.join()
            self._thread = None

    def let_go(self) -> None:
        """There will be nothing more; what is under way goes on, and is waited for at exit."""
        if self._thread is not None:
            _leaving.add(self)

    def end_with(self, owner: object) -> None:
        """End the thread when ``owner`` is no more, to which all refer that is under way."""
        weakref.finalize(owner, self._submitted.put, None).atexit = False

    def abandon(self, error: BaseException) -> None:
        """Carry nothing more out: what is queued fails with ``error``, what is under way by itself.

        The thread is not waited for.
        """
        while self._pending:
            self._pending.popleft().fail(error)
        if self._thread is not None:
            with suppress(queue.Empty):
                while (handle := self._submitted.get_nowait()) is not None:
                    handle.fail(error)
            self._submitted.put(None)
            self._thread = None

    def _start(self) -> None:
        if self._thread is None:
            # A daemon: a thread stuck in MPI must not keep a failing process alive.
            self._thread = threading.Thread(target=self._serve, name="mpizero", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        serve()
        self._on_start()
        if not self._has_core:
            shared_cores.share()
        try:
            while (handle := self._submitted.get()) is not None:
                self._run(handle)
                del handle  # with its result, while there is nothing to do
        finally:
            shared_cores.leave()

    def _run(self, handle: Handle) -> None:
        try:
            with self._turn:
                handle.run()
        finally:
            self._unfinished.discard(handle)

    def _catch_up(self) -> None:
        with suppress(queue.Empty):
            while (handle := self._submitted.get_nowait()) is not None:
                self._run(handle)
            self._submitted.put(None)  # the end, for ``_serve``

    def _block(self, wanted: Handle) -> None:
        """With a thread: wait for it, and let the others know."""
        if not wanted._finished.is_set():
            with recorded(self._waiting, f"waiting for {wanted.what}"):
                wanted._finished.wait()

    def _advance(self, wanted: Handle) -> None:
        """Without a thread: carry out everything up to ``wanted``."""
        if not self._pending or wanted._finished.is_set():
            return
        hand_over(but=self)
        with recorded(self._waiting, f"waiting for {wanted.what}"):
            while not wanted._finished.is_set() and self._run_next():
                pass

    def _run_next(self) -> bool:
        """Carry the first one out that is pending, if there is one."""
        with self._turn:  # so that what is taken first is carried out first, whoever takes it
            handle = self._next_pending()
            if not self._pending:
                _idle.discard(self)
            if handle is not None:
                self._run(handle)
        return handle is not None
