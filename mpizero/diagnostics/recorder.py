"""``Recorder``: a rank writes down what it does, as it does it.

On by default, so a call costs little: about as long as reading the clock twice and storing 72
bytes. What is written, others read: see ``record`` for the memory, ``watchdog`` for the use.
"""

from __future__ import annotations

import heapq
import os
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple, Protocol

from mpizero.diagnostics import record, threads
from mpizero.diagnostics.record import (
    AGREED,
    AT_JOB,
    AT_LEFT,
    AT_NODE,
    AT_PHASE,
    AT_PHASE_SINCE,
    AT_RANK,
    AT_SIZE,
    ENDED,
    ENTRY,
    ENTRY_BYTES,
    RING,
    RING_START,
    Descriptions,
    Texts,
    create_record,
)

# Whose frames are not the user's line of code: ours, and what lies between (torch's autograd, the
# standard library's context managers).
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_NOT_THE_USERS = (
    *(_PACKAGE, f"{os.sep}mpizero_torch{os.sep}", f"{os.sep}site-packages{os.sep}"),
    sysconfig.get_path("stdlib") + os.sep,
)

_clock, _pack, _thread = time.monotonic_ns, ENTRY.pack_into, threading.get_ident


class Ended(NamedTuple):
    """A call that has ended. Times are ``time.monotonic_ns``; ``agreed`` is 0 where not known.

    ``algorithm``: by which the data went, "" if none moved.
    """

    what: str
    line: str
    lane: str
    sequence: int
    nbytes: int
    begun: int
    agreed: int
    ended: int
    algorithm: str


class Listener(Protocol):
    """Who wants to hear of every call that has ended: a trace."""

    def call(self, call: Ended) -> None: ...

    def span(self, name: str, begun: int, ended: int) -> None: ...


class _Code(NamedTuple):
    """Whose a function is, and the texts of its lines that have made calls."""

    code: weakref.ref[CodeType]  # forgotten with it: another may get its place in memory
    is_users: bool
    lines: dict[int, int]


class Span(NamedTuple):
    """What is being done: its name, since when, and what was being done before."""

    name: str
    begun: int
    before: int


class Recorder:
    """This process's record, and the pen that writes it. One in a process, whatever its worlds."""

    def __init__(self, rank: int, size: int) -> None:
        self.record, self.fd = create_record(rank, size)
        self.texts, self.descriptions = Texts(self.record), Descriptions(self.record)
        self.listener: Listener | None = None
        self._memory = self.record.memory
        self._next = count(1).__next__  # threads may draw at once
        self._words = memoryview(self._memory).cast("q")
        self._places: dict[int, _Code] = {}
        self._lanes: dict[str, int] = {}  # how many there have been of a name
        self._forming: dict[str, Lane] = {}
        self._idle: dict[str, list[tuple[int, int]]] = {}  # given back: their numbers, and calls

    def place(self, rank: int, size: int, node: int, job: int) -> None:
        """Say which rank of how many, on which node, of which job this process is."""
        header = self.record.header
        header[AT_RANK], header[AT_SIZE], header[AT_NODE], header[AT_JOB] = rank, size, node, job

    def lane(self, ranks: str, kind: str) -> Lane:
        """A lane: calls that ``ranks`` make together, in an order of their own.

        A new one, or one that has been given back, which goes on where that one ended.
        """
        idle = self._idle.get(f"{ranks} {kind}")
        return self._open(ranks, kind, *(heapq.heappop(idle) if idle else ()))

    def forming(self, ranks: str, kind: str) -> Lane:
        """The lane for what ``ranks`` do before they have a way to agree on one."""
        found = self._forming.get(ranks)
        if found is None:
            found = self._forming[ranks] = self._open(ranks, kind)
        return found

    def _open(self, ranks: str, kind: str, number: int = 0, sequence: int = 0) -> Lane:
        name = f"{ranks} {kind}"
        if not number:
            number = self._lanes[name] = self._lanes.get(name, 0) + 1
        text = name if number == 1 else f"{ranks} ({number}) {kind}"
        return Lane(self, text, partial(self._take_back, name, number), sequence)

    def _take_back(self, name: str, number: int, sequence: int) -> None:
        heapq.heappush(self._idle.setdefault(name, []), (number, sequence))

    def here(self) -> int:
        """The line of the user's code that is being carried out, as the offset of its text."""
        frame: FrameType | None = sys._getframe(1)
        places = self._places
        while frame is not None:
            # Code objects are told apart by identity: their hash goes through all of their content.
            known = places.get(id(frame.f_code))
            if known is None:
                known = self._new_code(frame.f_code)
            if known.is_users:
                return known.lines.get(frame.f_lasti) or self._new_line(known, frame)
            frame = frame.f_back
        return 0

    def _new_code(self, code: CodeType) -> _Code:
        is_users = not any(part in code.co_filename for part in _NOT_THE_USERS)
        number, places = id(code), self._places
        reference = weakref.ref(code, lambda _: places.pop(number, None))
        known = places[number] = _Code(reference, is_users, {})
        return known

    def _new_line(self, known: _Code, frame: FrameType) -> int:
        name = Path(frame.f_code.co_filename).name
        at = self.texts.put(f"{name}:{frame.f_lineno} in {frame.f_code.co_name}")
        known.lines[frame.f_lasti] = at
        return at

    def leave(self) -> None:
        """This rank has come to the end of its program."""
        self.record.note_threads(threads.of_program())
        self.record.header[AT_LEFT] = 1

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """What is done meanwhile, beside calls: "forward", "optimizer"."""
        opened = self.begin_span(name)
        try:
            yield
        finally:
            self.end_span(opened)

    def begin_span(self, name: str) -> Span:
        """``span`` for what begins in one function and ends in another."""
        header = self.record.header
        opened = Span(name, _clock(), int(header[AT_PHASE]))
        header[AT_PHASE], header[AT_PHASE_SINCE] = self.texts.put(name), opened.begun
        return opened

    def end_span(self, opened: Span) -> None:
        header, ended = self.record.header, _clock()
        header[AT_PHASE], header[AT_PHASE_SINCE] = opened.before, ended
        if self.listener is not None:
            self.listener.span(opened.name, opened.begun, ended)


class Lane:
    """Calls that the same ranks make one after the other. Belongs to one thread at a time."""

    def __init__(
        self,
        recorder: Recorder,
        name: str,
        take_back: Callable[[int], None],
        sequence: int = 0,
    ) -> None:
        self.recorder, self.name = recorder, name
        self._take_back = take_back
        self._text = recorder.texts.put(name)
        self._put, self._known = recorder.descriptions.put, recorder.descriptions.known
        self._memory, self._words = recorder._memory, recorder._words
        self._next = recorder._next
        self.sequence = sequence  # of the last call

    def give_back(self, sequence: int) -> None:
        """There will be no more calls; whoever gets the name counts on from ``sequence``."""
        self._take_back(sequence)

    def begin(self, what: str, nbytes: int = 0, line: int = 0) -> int:
        """A call begins; returns where it is written down."""
        self.sequence = sequence = self.sequence + 1
        number = self._next()
        at = RING_START + number % RING * ENTRY_BYTES
        both = (nbytes & 0x7FFFFFFFFF) << 24 | (sequence & 0xFFFFFF)
        text = self._known.get(what) or self._put(what)
        _pack(self._memory, at, number, _clock(), 0, 0, text, line, self._text, both, _thread())
        return at >> 3

    def begin_behind(self, other: Lane, what: str, nbytes: int = 0, line: int = 0) -> int:
        """``begin``, where the calls of this lane and of ``other`` have one order and are counted
        together. The two belong to one thread at a time."""
        self.sequence = other.sequence
        at = self.begin(what, nbytes, line)
        other.sequence = self.sequence
        return at

    def again(self, sequence: int, what: str, line: int = 0) -> int:
        """Go on with an earlier call of the lane, which had been ended: wait for it now."""
        newest, self.sequence = self.sequence, sequence - 1
        try:
            return self.begin(what, 0, line)
        finally:
            self.sequence = newest

    def agreed(self, at: int) -> None:
        """All ranks have come to the call that ``begin`` gave this place: data moves."""
        self._words[at + AGREED] = _clock()

    def end(self, at: int, algorithm: str = "") -> None:
        """The call has ended, or failed; ``algorithm`` is for those who listen."""
        ended = self._words[at + ENDED] = _clock()
        listener = self.recorder.listener
        if listener is not None:
            row = self._words[at : at + record.FIELDS].tolist()
            text, both = self.recorder.record.text, row[record.SEQUENCE_BYTES]
            line = text(row[record.LINE]) if row[record.LINE] else ""
            listener.call(
                Ended(
                    text(row[record.TEXT]), line, self.name, both & 0xFFFFFF, both >> 24,
                    row[record.BEGUN], row[record.AGREED], ended, algorithm,
                )
            )  # fmt: skip


@contextmanager
def recorded(lane: Lane, what: str, nbytes: int = 0) -> Iterator[None]:
    """For calls that need not be quick."""
    at = lane.begin(what, nbytes, lane.recorder.here())
    try:
        yield
    finally:
        lane.end(at)
