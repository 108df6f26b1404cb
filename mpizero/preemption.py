"""Leaving in time: a job that is about to be stopped saves first, at one step on all ranks.

Schedulers warn by a signal (Slurm's ``--signal``, a preemption), which may reach some ranks and not
others, and at different steps; and every job has a time limit, which the scheduler knows.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn

from mpizero.api import World, init
from mpizero.errors import ArgumentError
from mpizero.world.abort import expect_exit
from mpizero.world.time_left import seconds_left

# sysexits.h: "temporary failure; the user is invited to retry".
TRY_AGAIN = 75

_log = logging.getLogger("mpizero")


class PreemptionGuard:
    """Tells, in each step, whether it is time to save and go::

        guard = mpizero.PreemptionGuard()
        for step, batch in enumerate(batches):
            ...
            if guard.should_stop():
                save(...)
                guard.exit()

    That is so once any rank has received one of ``signals``, or when less than ``margin`` seconds
    are left of the job's time limit (as Slurm or PBS tells rank 0; or of ``time_left`` seconds from
    now). ``exit`` ends all ranks with status ``exit_code``, by which a job script knows that it is
    to be started again.

    As a context manager, or by ``close``, it gives the signals back to who had them. To be made in
    the main thread, on all ranks, with the same arguments.

    Raises ArgumentError for signals that cannot be caught, or from another thread.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals | int] = (signal.SIGTERM, signal.SIGUSR1),
        margin: float = 120.0,
        *,
        time_left: float | None = None,
        exit_code: int = TRY_AGAIN,
        world: World | None = None,
    ) -> None:
        self.world, self._exit_code = world or init(), exit_code
        if margin < 0:
            raise ArgumentError("PreemptionGuard()", "margin", str(margin), "0 s or more")
        if not 0 <= exit_code <= 255:
            raise ArgumentError("PreemptionGuard()", "exit_code", str(exit_code), "0 to 255")
        self._received = 0  # the number of the signal
        self._stopping = False
        self._before: dict[int, Any] = {}
        for number in signals:
            try:
                self._before[number] = signal.signal(number, self._receive)
            except (OSError, ValueError) as error:
                self.close()
                raise ArgumentError(
                    "PreemptionGuard()", "signals", f"{number!r}, which cannot be had ({error})",
                    "signals that can be caught, in the main thread",
                ) from None  # fmt: skip
        if time_left is None and self.world.rank == 0:
            time_left = seconds_left()
        self._leave_at = None if time_left is None else time.monotonic() + time_left - margin
        if time_left is not None and self.world.rank == 0:
            _log.info("the job has %.0f s left; it will save %.0f s before", time_left, margin)

    def should_stop(self) -> bool:
        """Is it time to save and go? The same answer on all ranks. Collective, in every step.

        Costs one exchange of a number: a few microseconds in a node.
        """
        if not self._stopping:
            late = (
                self.world.rank == 0
                and self._leave_at is not None
                and time.monotonic() >= self._leave_at
            )
            # A signal's number, or a larger one for the time limit: max knows both.
            reason = int(self.world.allreduce(signal.NSIG if late else self._received, "max"))
            self._stopping = reason > 0
            if reason and self.world.rank == 0:
                why = (
                    "the job's time is nearly over"
                    if reason >= signal.NSIG
                    else f"a rank has received {signal.Signals(reason).name}"
                )
                print(f"[mpizero] {why}: saving, and leaving", file=sys.stderr, flush=True)
        return self._stopping

    def exit(self) -> NoReturn:
        """End all ranks with the exit code, in good order. Collective; raises SystemExit."""
        self.world.barrier()
        expect_exit(self._exit_code)
        sys.exit(self._exit_code)

    def close(self) -> None:
        """Give the signals back to who had them before."""
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)

    def __enter__(self) -> PreemptionGuard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received = number
