"""One thread at a time makes a World's calls.

Ranks match their calls by order. Where two threads of a rank call as they come, one rank's first
may meet another rank's second, and if the two look alike nobody notices. So a thread is refused
while another may still call: until that has ended, or waits for something (as who has started a
thread and joins it does).
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import weakref

from mpizero.diagnostics.threads import is_in_order, is_ours, serves
from mpizero.errors import MpizeroError

# How long a second thread waits for the first to end or to wait.
_NAPS, _NAP_SECONDS = 250, 0.002

_get_ident = threading.get_ident


class OneThread:
    """``enter`` and, if that returns True, ``leave`` around each call."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a call may make others
        self._owner = 0
        self._thread: weakref.ref[threading.Thread] | None = None

    def enter(self, what: str) -> bool:
        """A call begins; False if it is made for another thread, which waits for it.

        Raises MpizeroError where another thread is inside, or may come.
        """
        me = _get_ident()
        if me != self._owner and _is_anothers_hand(me):
            return False
        if me != self._owner:
            self._take_over(me, what)
        elif not self._lock.acquire(blocking=False):
            raise self._refusal(what)
        return True

    def leave(self) -> None:
        """It has ended."""
        self._lock.release()

    def _take_over(self, me: int, what: str) -> None:
        for _ in range(_NAPS):  # who has started this thread may be about to join it
            if self._lock.acquire(blocking=False):
                if self._has_left():
                    self._owner, self._thread = me, weakref.ref(threading.current_thread())
                    return
                self._lock.release()
            time.sleep(_NAP_SECONDS)
        raise self._refusal(what)

    def _has_left(self) -> bool:
        """Has the thread that has called before ended, or does it wait for another one's sign?"""
        before = None if self._thread is None else self._thread()
        if before is None or not before.is_alive():
            return True
        frame = sys._current_frames().get(self._owner)
        if frame is None or frame.f_code.co_filename != threading.__file__:
            return frame is None
        while frame is not None and frame.f_code.co_filename == threading.__file__:
            if frame.f_code.co_name == "start":  # of a thread: it is about to go on
                return False
            frame = frame.f_back
        # Who waits for work from a queue, or for the other ranks, goes on by itself.
        return frame is None or not _waits_for_no_thread(frame.f_code.co_filename)

    def _refusal(self, what: str) -> MpizeroError:
        before = None if self._thread is None else self._thread()
        other = "another one" if before is None else repr(before.name)
        return MpizeroError(
            f"{what}: called by the thread {threading.current_thread().name!r}, while the thread "
            f"{other} makes this World's calls. Ranks match calls by their order, which two "
            "threads do not have. Give each thread a World of its own, world.split(0), made on "
            "all ranks in the same order; or end, or join, the one thread before the other calls."
        )


def _is_anothers_hand(ident: int) -> bool:
    """A thread of ours, or of a library's (torch's backward), serves one that waits for it."""
    thread = threading.current_thread()
    return isinstance(thread, threading._DummyThread) or serves(thread) or is_in_order()


def _waits_for_no_thread(file: str) -> bool:
    return file == queue.__file__ or is_ours(file)
