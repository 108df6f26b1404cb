"""What can be seen of a rank, and what follows from what is seen of all: who waits for whom."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from mpizero.diagnostics.process import GONE, state_of
from mpizero.diagnostics.record import Made, Record

LEFT, UNSEEN = "left", "unseen"

DIED = "died"  # the last word of what ``hopeless`` says of that

BLOCKING, ASYNCHRONOUS, WAITING = "blocking", "asynchronous", "waiting"

# Where blocking and asynchronous calls have one order: the kind of the latter.
IN_ORDER = "in order"
IN_ORDER_BLOCKING = f"{IN_ORDER}, {BLOCKING}"
_UNDER_WAY = (ASYNCHRONOUS, IN_ORDER)

# A call, as all of its ranks know it: the order that it is in, and its number there.
Key = tuple[str, int]

_SHOWN_CALLS = 6


@dataclass(frozen=True)
class View:
    """One rank as others see it. Ages in seconds.

    ``threads``: those that run its program's code, the main thread first; none: not known.
    """

    rank: int
    host: str = ""
    pid: int = 0
    state: str = UNSEEN  # RUNNING, STOPPED, GONE, LEFT (its program came to its end), UNSEEN
    calls: tuple[Made, ...] = ()  # open ones, and the last
    phase: str = ""
    phase_age: float = 0.0
    stack: str = ""
    threads: tuple[int, ...] = ()

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
        """Does all of its program wait in calls, or for them, so that it begins nothing new?

        A thread that runs, whatever it does, may come to make the call that others wait for.
        """
        running = self.threads[1:] if self.state == LEFT else self.threads
        return bool(self.threads) and set(running) <= {call.thread for call in self._waits()}

    @property
    def is_over(self) -> bool:
        """Has its program come to its end, and will make no call any more?"""
        return self.state == LEFT and self.is_blocked

    def main_waits_for(self, never: Collection[Key]) -> bool:
        """Does its main thread wait for one of the calls that ``never`` come to their end?

        It may wait for any that is under way: then all of these must be such ones.
        """
        mine = [call for call in self._waits() if call.thread in self.threads[:1]]
        if any(key(call) in never for call in mine):
            return True
        under_way = [key(call) for call in self.open_calls if call.lane.endswith(_UNDER_WAY)]
        waits = any(call.lane.endswith(WAITING) for call in mine)
        return waits and bool(under_way) and all(each in never for each in under_way)

    def _waits(self) -> list[Made]:
        """The calls that a thread of its program is in, or waits for."""
        kinds = (BLOCKING, WAITING)
        return [call for call in self.calls if call.is_open and call.lane.endswith(kinds)]

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
    return View(
        record.rank, host, record.pid, state, tuple(calls), record.phase, phase_age,
        threads=record.threads,
    )  # fmt: skip


def order(lane: str) -> str:
    """The name of the order in which a lane's calls are made; several lanes may share it."""
    return lane.replace(IN_ORDER_BLOCKING, IN_ORDER)


def key(call: Made) -> Key:
    """By which the ranks' views of one call are put together."""
    return order(call.lane), call.sequence


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
    by_call: dict[Key, list[tuple[Made, int]]] = {}
    for view in views:
        for call in view.open_calls:
            by_call.setdefault(key(call), []).append((call, view.rank))
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

    It says so only where nothing can help any more. A rank that is waited for is gone. Or it has
    come to its end, and another's main thread waits for it. Or nothing runs on any rank: every
    thread waits, and none in a call to which all of its ranks have come.
    """
    calls = stuck_calls(views)
    stuck = [each for each in calls if each.missing]
    seen = {view.rank: view for view in views}
    awaited = sorted({rank for each in stuck for rank in each.missing})
    gone = [rank for rank in awaited if rank in seen and seen[rank].state == GONE]
    if gone:
        return f"{name(gone)} {'has' if len(gone) == 1 else 'have'} {DIED}"
    left = [rank for rank in awaited if rank in seen and seen[rank].is_over]
    never = {key(each.call) for each in stuck if not set(left).isdisjoint(each.missing)}
    if left and any(view.main_waits_for(never) for view in views):
        has = "has" if len(left) == 1 else "have"
        return f"{name(left)} {has} come to the end of the program, and others wait"
    everyone_waits = len(views) == size and all(
        view.is_blocked or view.state == GONE for view in views
    )
    if everyone_waits and stuck and len(stuck) == len(calls):
        return "the ranks wait for each other in different calls"
    return ""


def name(ranks: Iterable[int]) -> str:
    """ "rank 2", or "ranks 0-3, 6"."""
    numbers = list(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {as_ranges(numbers).replace(',', ', ')}"


def fingerprint(views: Sequence[View]) -> tuple[object, ...]:
    """Equal as long as nobody moves."""
    return tuple(
        (
            view.rank,
            view.state,
            view.threads,
            tuple((call.number, call.is_open) for call in view.calls),
        )
        for view in views
    )
