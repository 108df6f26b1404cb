"""The watchdog: a thread that notices when this rank waits for too long, and says for whom.

Looks once in a while at how long the oldest call of this rank has been open. After a moment it
looks at the ranks of the node too: if what is waited for can never come, because a rank has died,
has left, or waits elsewhere for this one, the job is over now; else when the time is up. One rank
of a node reports; then it ends the job.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from mpizero.diagnostics import stacks, threads
from mpizero.diagnostics.between_nodes import OtherNodes
from mpizero.diagnostics.node import NodeRecords
from mpizero.diagnostics.process import oom_kills
from mpizero.diagnostics.record import AT_ENDED_BY
from mpizero.diagnostics.recorder import Recorder
from mpizero.diagnostics.report import report
from mpizero.diagnostics.views import DIED, View, fingerprint, hopeless
from mpizero.world.abort import say_last

_TICK_SECONDS = 0.5

# A call that has been open for this long makes a rank look at the others.
_SUSPICIOUS_SECONDS = 1.0

# What looks hopeless must look so for this long, unchanged: a rank may be on its way.
_CERTAIN_SECONDS = 2.0

# Questions to other nodes cost messages: the first after so many seconds, then twice that, ...
_ASK_OTHERS_AFTER = 4.0

# Who finds another rank reporting leaves it this long to end the job.
_GRACE_SECONDS = 20.0

# A job that MPI_Abort does not end: MPI itself may be stuck.
_ABORT_SECONDS = 5.0

# Done when a call has been open for a moment: what could let it go on.
when_late: list[Callable[[], None]] = []

STATUS = 124  # as the command `timeout` ends with


class Watchdog:
    """Watches over this rank's calls. ``abort(status)`` ends the job; ``timeout`` in seconds."""

    def __init__(
        self,
        recorder: Recorder,
        node: NodeRecords,
        others: OtherNodes | None,
        timeout: float | None,
        abort: Callable[[int], None],
    ) -> None:
        self.timeout = timeout
        self._recorder, self._record = recorder, recorder.record
        self._node, self._others = node, others
        self._abort = abort
        self._rank, self._size = self._record.rank, self._record.size
        self._oom_kills = oom_kills()
        self._ask_after = _ASK_OTHERS_AFTER
        self._suspect: tuple[tuple[object, ...], float] | None = None
        self._said: tuple[tuple[object, ...], float] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mpizero-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread: before MPI ends, which it may be calling."""
        self._stop.set()
        self._thread.join(_ABORT_SECONDS)

    def _watch(self) -> None:
        threads.serve()
        while not self._stop.wait(_TICK_SECONDS):
            try:
                self._look()
            except Exception as error:  # a watchdog that fails must not take the job with it
                _print(f"mpizero: rank {self._rank}: the watchdog failed: {error!r}\n")
                return

    def _look(self) -> None:
        self._record.note_threads(threads.of_program())
        self._node.answer()
        if self._others is not None:
            self._others.answer()
        if self._node.was_asked:
            self._answer_signal()
        begun = self._record.oldest_open()
        age = 0.0 if begun is None else (time.monotonic_ns() - begun) / 1e9
        if age < _SUSPICIOUS_SECONDS:
            self._suspect, self._ask_after = None, _ASK_OTHERS_AFTER
            stacks.start_over(self._record, self._recorder.fd)
            return
        for task in when_late:
            task()
        why, is_death = self._is_hopeless(age)
        if why and (is_death or self.timeout is not None):
            self._end(f"{why}. The job ends here.")
        elif why:
            self._say_once(f"{why}. The job goes on: MPIZERO_TIMEOUT or init(timeout=) say so")
        elif self.timeout is not None and age > self.timeout:
            self._end(
                f"rank {self._rank} has waited for {age:.0f} s, longer than MPIZERO_TIMEOUT or "
                f"init(timeout=) allow ({self.timeout:g} s). The job ends here."
            )

    def _say_once(self, title: str) -> None:
        if self._said == self._suspect:
            return
        self._said = self._suspect
        with self._node.speak() as mine:
            if mine:
                _print(report(title, self._see_all(ends=False), self._notes()))

    def _is_hopeless(self, age: float) -> tuple[str, bool]:
        """Why the wait can never end; "" if it may, or if that is not certain yet.

        And: is that so because a rank has died?
        """
        views = self._node.look()
        if self._others is not None and age > self._ask_after:
            self._ask_after *= 2
            views += self._others.ask(with_stacks=False)
        why = hopeless(views, self._size)
        if not why:
            if len(views) == self._size:
                self._suspect = None
            return "", False
        seen, now = fingerprint(views), time.monotonic()
        if self._suspect is None or self._suspect[0] != seen:
            self._suspect = seen, now
        is_certain = now - self._suspect[1] > _CERTAIN_SECONDS
        return why if is_certain else "", DIED in why

    def _answer_signal(self) -> None:
        """Somebody has sent the signal to a rank of this node: report, and go on."""
        with self._node.speak() as mine:
            if mine and self._node.was_asked:
                views = self._see_all(ends=False)
                title = f"as asked by SIGUSR2, what the {self._size} ranks are doing"
                _print(report(title, views, self._notes()))

    def _end(self, title: str) -> None:
        with self._node.speak() as mine:
            if mine and not self._record.header[AT_ENDED_BY]:
                views = self._see_all(ends=True)
                # Of two nodes that have begun at once the one with the lower rank goes on.
                other = int(self._record.header[AT_ENDED_BY])
                if not 0 < other <= self._rank:
                    say_last(report(title, views, self._notes()))
                    self._kill()
                    return
        self._leave_it_to_another()

    def _leave_it_to_another(self) -> None:
        """Another rank is about to end the job, and may want this one's stacks for its report."""
        given_up = time.monotonic() + _GRACE_SECONDS
        while not self._stop.wait(_TICK_SECONDS):
            self._node.answer()
            if time.monotonic() > given_up:
                self._kill()
                return

    def _see_all(self, *, ends: bool) -> list[View]:
        """All ranks, with their stacks. ``ends``: the job's end follows."""
        views = self._node.look(with_stacks=True, wake=ends)
        if self._others is not None:
            views += self._others.ask(with_stacks=True, ends=ends)
        return sorted(views, key=lambda view: view.rank)

    def _notes(self) -> Sequence[str]:
        kills = oom_kills() - self._oom_kills
        if kills > 0:
            return [f"the kernel has killed {kills} process(es) of this job for want of memory"]
        return []

    def _kill(self) -> None:
        timer = threading.Timer(_ABORT_SECONDS, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        self._abort(STATUS)


def _print(text: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()
