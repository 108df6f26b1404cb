"""What can be seen of a rank, and what follows from what is seen of all: who waits for whom."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mpizero.diagnostics.process import GONE, state_of
from mpizero.diagnostics.record import Made, Record

LEFT, UNSEEN = "left", "unseen"

BLOCKING, ASYNCHRONOUS, WAITING = "blocking", "asynchronous", "waiting"

# Where blocking and asynchronous calls have one order: the kind of the latter.
IN_ORDER = "in order"
IN_ORDER_BLOCKING = f"{IN_ORDER}, {BLOCKING}"

_SHOWN_CALLS = 6


@dataclass(frozen=True)
class View:
    """One rank as others see it. Ages in seconds."""

    rank: int
    host: str = ""
    pid: int = 0
    state: str = UNSEEN  # RUNNING, STOPPED, GONE, LEFT (its program came to its end), UNSEEN
    calls: tuple[Made, ...] = ()  # open ones, and the last
    phase: str = ""
    phase_age: float = 0.0
    stack: str = ""

    @property
    def open_calls(self) -> list[Made]:
        """What it is in the middle of."""
        return [call for call in self.calls if call.is_open and not call.lane.endswith(WAITING)]

    @property
    def last_done(self) -> Made | None:
        """The last call that has ended."""
        return next((call for call in reversed(self.calls) if not call.is_open), None)

    @property
    def is_blocked(self) -> bool:
        """Does its program wait in a call, or for one?"""
        kinds = (BLOCKING, WAITING)
        return any(call.is_open and call.lane.endswith(kinds) for call in self.calls)

    def has_come_to(self, lane: str, sequence: int) -> bool:
        """Has it begun this call, or a later one of the lane?"""
        return any(order(call.lane) == lane and call.sequence >= sequence for call in self.calls)


@dataclass(frozen=True)
class Stuck:
    """A call in which some ranks wait for others."""

    call: Made
    waiting: tuple[int, ...]
    missing: tuple[int, ...]


def look_at(record: Record, host: str) -> View:
    """The view of a rank of this node."""
    now = time.monotonic_ns()
    calls = record.calls(now)
    kept = [call for call in calls[:-_SHOWN_CALLS] if call.is_open] + calls[-_SHOWN_CALLS:]
    last_of_lane = {call.lane: call for call in calls}
    kept += [call for call in last_of_lane.values() if call not in kept]
    state = state_of(record.pid)
    if record.has_left and state != GONE:
        state = LEFT
    phase_age = (now - record.phase_since) / 1e9 if record.phase_since else 0.0
    calls = sorted(kept, key=lambda call: call.number)
    return View(record.rank, host, record.pid, state, tuple(calls), record.phase, phase_age)


def order(lane: str) -> str:
    """The name of the order in which a lane's calls are made; several lanes may share it."""
    return lane.replace(IN_ORDER_BLOCKING, IN_ORDER)


def members(lane: str) -> set[int]:
    """The ranks of a lane, from its name: "0-3,6 (2) blocking"."""
    found: set[int] = set()
    for part in lane.split(" ")[0].split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def as_ranges(ranks: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    found: list[list[int]] = []
    for rank in sorted(ranks):
        if found and found[-1][1] == rank - 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def stuck_calls(views: Sequence[View]) -> list[Stuck]:
    """The calls in which ranks wait for ranks that have not come; the oldest first."""
    by_call: dict[tuple[str, int], list[tuple[Made, int]]] = {}
    for view in views:
        for call in view.open_calls:
            by_call.setdefault((order(call.lane), call.sequence), []).append((call, view.rank))
    found = []
    seen = {view.rank: view for view in views}
    for (lane, sequence), pairs in by_call.items():
        waiting = {rank for _, rank in pairs}
        missing = sorted(
            rank
            for rank in members(lane) - waiting
            if rank not in seen or not seen[rank].has_come_to(lane, sequence)
        )
        oldest = max((call for call, _ in pairs), key=lambda call: call.age)
        found.append(Stuck(oldest, tuple(sorted(waiting)), tuple(missing)))
    return sorted(found, key=lambda stuck: -stuck.call.age)


def hopeless(views: Sequence[View], size: int) -> str:
    """Why what the ranks wait for can never come; "" if it may.

    A rank that is waited for is gone, or has left; or every rank waits, and none in a call to which
    all its ranks have come.
    """
    stuck = [each for each in stuck_calls(views) if each.missing]
    seen = {view.rank: view for view in views}
    awaited = sorted({rank for each in stuck for rank in each.missing})
    gone = [rank for rank in awaited if rank in seen and seen[rank].state == GONE]
    if gone:
        return f"{name(gone)} {'has' if len(gone) == 1 else 'have'} died"
    left = [rank for rank in awaited if rank in seen and seen[rank].state == LEFT]
    if left:
        has = "has" if len(left) == 1 else "have"
        return f"{name(left)} {has} come to the end of the program, and others wait"
    everyone_waits = len(views) == size and all(
        view.is_blocked or view.state in (LEFT, GONE) for view in views
    )
    complete = [each for each in stuck_calls(views) if not each.missing]
    if everyone_waits and stuck and not complete:
        return "the ranks wait for each other in different calls"
    return ""


def name(ranks: Iterable[int]) -> str:
    """ "rank 2", or "ranks 0-3, 6"."""
    numbers = list(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {as_ranges(numbers).replace(',', ', ')}"


def fingerprint(views: Sequence[View]) -> tuple[object, ...]:
    """Equal as long as nobody moves."""
    return tuple(
        (view.rank, view.state, tuple((call.number, call.is_open) for call in view.calls))
        for view in views
    )
