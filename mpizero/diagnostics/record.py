"""What a rank leaves for others to read: a small ring of what it did, in memory that outlives it.

Each rank writes into an anonymous file (memfd) that the other ranks of its node map as well, so
that they can read it without its help: while it is stuck in a loop or in C, stopped, or gone. The
memory has no name that could be left behind, and goes with the last process that maps it.

    header          counters and states, of 8 bytes each
    ring            the last calls: when they began, were agreed upon and ended, what and where
    texts           each lane and line of code once; a call names them by their offset
    descriptions    of calls likewise, of which a program may make any number of different ones:
                    two halves by turns, each with room for those of all calls in the ring
    stacks          of the main thread, which faulthandler writes at its own pace
    answer          of all threads, which the rank's own watchdog writes when it is asked
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RING = 512  # calls
FIELDS = 9  # of a call, 8 bytes each
_HEADER_BYTES, ENTRY_BYTES = 4096, 8 * FIELDS
RING_START = _HEADER_BYTES
TEXT_START = RING_START + RING * ENTRY_BYTES
_TEXT_BYTES = 512 << 10  # as all that follow: takes memory as far as it is written
DESCRIPTION_START = TEXT_START + _TEXT_BYTES
_LENGTH = struct.Struct("<H")
_LONGEST_TEXT = 1000
_HALF_BYTES = RING * (_LENGTH.size + _LONGEST_TEXT)
STACK_START = DESCRIPTION_START + 2 * _HALF_BYTES
STACK_BYTES = ANSWER_BYTES = 1 << 20
ANSWER_START = STACK_START + STACK_BYTES
NBYTES = ANSWER_START + ANSWER_BYTES

NAME = "mpizero-record"  # of the files, by which a job's processes are found
MAGIC = 0x6D70697A65726F31

# Places in the header.
(
    AT_MAGIC,
    AT_PID,
    AT_RANK,
    AT_SIZE,
    AT_TEXT_END,
    AT_STACK_READ,  # how much of the stacks has been reported: whoever reports moves it
    AT_LEFT,  # 1: this rank came to the end of its program
    AT_PHASE,  # offset of a text: what the rank does between calls
    AT_PHASE_SINCE,
    AT_NODE,  # the rank's node, counted
    AT_JOB,  # one number for all ranks of a job
    AT_ENDED_BY,  # 1 + a rank of another node that is about to report and end the job; 0: none
    AT_ASKED,  # how often this rank has been asked for the stacks of all of its threads
    AT_ANSWERED,  # the last of these questions that it has answered
    AT_ANSWER_BYTES,
    AT_THREAD_COUNT,  # of threads that run the program's code; 0: not known
    AT_THREADS,  # who they are, the main thread first
) = range(17)
_MOST_THREADS = 256

# Fields of a call. Times are CLOCK_MONOTONIC, in ns, which all processes of a node have in common.
NUMBER, BEGUN, AGREED, ENDED, TEXT, LINE, LANE, SEQUENCE_BYTES, THREAD = range(FIELDS)
_SEQUENCE_BITS = 24  # SEQUENCE_BYTES = nbytes << 24 | sequence number modulo 2^24

ENTRY = struct.Struct(f"<{FIELDS}q")


@dataclass(frozen=True)
class Made:
    """One call of a rank: what, in which lane and turn, on how many bytes, from which line.

    ``lane``: the ranks that make it together, and the kind of call, as "0-3 blocking"; ``sequence``
    counts the calls of a lane. ``age``, ``took``: seconds since it began, and that it took (None:
    it has not ended). ``thread``: which of the rank's threads makes it.
    """

    number: int
    what: str
    line: str
    lane: str
    sequence: int
    nbytes: int
    age: float
    took: float | None
    thread: int = 0

    @property
    def is_open(self) -> bool:
        return self.took is None


class Record:
    """The memory of one rank's record, mapped here: its own, or another's."""

    def __init__(self, fd: int) -> None:
        self.memory = mmap.mmap(fd, NBYTES)
        self.header = np.frombuffer(self.memory, np.int64, _HEADER_BYTES // 8)
        self._ring = np.frombuffer(self.memory, np.int64, RING * FIELDS, RING_START)
        self._ring = self._ring.reshape(RING, FIELDS)

    @classmethod
    def of_process(cls, pid: int, fd: int) -> Record | None:
        """Another process's; None where the system does not let us see it."""
        try:
            opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        except OSError:
            return None
        try:
            record = cls(opened)
        except (OSError, ValueError):
            return None
        finally:
            os.close(opened)
        return record if record.header[AT_MAGIC] == MAGIC and record.pid == pid else None

    @property
    def pid(self) -> int:
        return int(self.header[AT_PID])

    @property
    def rank(self) -> int:
        return int(self.header[AT_RANK])

    @property
    def size(self) -> int:
        return int(self.header[AT_SIZE])

    @property
    def node(self) -> int:
        return int(self.header[AT_NODE])

    @property
    def job(self) -> int:
        return int(self.header[AT_JOB])

    @property
    def has_left(self) -> bool:
        """Has the rank come to the end of its program?"""
        return bool(self.header[AT_LEFT])

    @property
    def phase(self) -> str:
        """What the rank said it was doing beside calls."""
        at = int(self.header[AT_PHASE])
        return self.text(at) if at else ""

    @property
    def phase_since(self) -> int:
        return int(self.header[AT_PHASE_SINCE])

    @property
    def threads(self) -> tuple[int, ...]:
        """Those that run the program's code, the main thread first; none if that is not known."""
        count = int(self.header[AT_THREAD_COUNT])
        return tuple(self.header[AT_THREADS : AT_THREADS + count].tolist())

    def note_threads(self, idents: Sequence[int]) -> None:
        """Say which there are. For the process itself."""
        known = idents if len(idents) <= _MOST_THREADS else ()
        self.header[AT_THREADS : AT_THREADS + len(known)] = known
        self.header[AT_THREAD_COUNT] = len(known)

    def text(self, at: int) -> str:
        """The text with this offset."""
        if not TEXT_START <= at < STACK_START:
            return "?"
        (length,) = _LENGTH.unpack_from(self.memory, at)
        return self.memory[at + 2 : at + 2 + min(length, _LONGEST_TEXT)].decode(errors="replace")

    def oldest_open(self) -> int | None:
        """When the call began that has been open for longest; None if none is."""
        ring = self._ring
        begun = ring[(ring[:, NUMBER] > 0) & (ring[:, ENDED] == 0), BEGUN]
        return int(begun.min()) if begun.size else None

    def calls(self, now: int) -> list[Made]:
        """The calls in the ring, the oldest first. ``now``: the clock, in ns."""
        ring = self._ring[self._ring[:, NUMBER] > 0]
        return [self._made(row, now) for row in ring[np.argsort(ring[:, NUMBER])].tolist()]

    @property
    def stack_end(self) -> int:
        """How many bytes of stacks have been written."""
        start = STACK_START + int(self.header[AT_STACK_READ])
        end = self.memory.find(b"\0", start, ANSWER_START)
        return (ANSWER_START if end < 0 else end) - STACK_START

    @property
    def has_new_stacks(self) -> bool:
        """Have stacks been written that nobody has reported?"""
        at = STACK_START + int(self.header[AT_STACK_READ])
        return at < ANSWER_START and self.memory[at] != 0

    def stacks(self, start: int, end: int) -> str:
        """What was written between two places of ``stack_end``."""
        return self.memory[STACK_START + start : STACK_START + end].decode(errors="replace")

    def ask(self) -> int:
        """Ask the rank for the stacks of its threads; the number of the question."""
        self.header[AT_ASKED] += 1
        return int(self.header[AT_ASKED])

    @property
    def asked(self) -> int:
        """The number of the last question, if it is still open; 0 if none is."""
        number = int(self.header[AT_ASKED])
        return number if number > self.header[AT_ANSWERED] else 0

    def give_answer(self, number: int, text: str) -> None:
        """Answer all questions up to ``number``. For the process itself."""
        data = text.encode(errors="replace")[:ANSWER_BYTES]
        self.memory[ANSWER_START : ANSWER_START + len(data)] = data
        self.header[AT_ANSWER_BYTES] = len(data)
        self.header[AT_ANSWERED] = number

    def answer(self, number: int) -> str | None:
        """What the rank has answered to a question; None if it has not yet."""
        if self.header[AT_ANSWERED] < number:
            return None
        end = ANSWER_START + int(self.header[AT_ANSWER_BYTES])
        return self.memory[ANSWER_START:end].decode(errors="replace")

    def _made(self, row: list[int], now: int) -> Made:
        begun, ended = row[BEGUN], row[ENDED]
        return Made(
            row[NUMBER],
            self.text(row[TEXT]),
            self.text(row[LINE]) if row[LINE] else "",
            self.text(row[LANE]),
            row[SEQUENCE_BYTES] & ((1 << _SEQUENCE_BITS) - 1),
            row[SEQUENCE_BYTES] >> _SEQUENCE_BITS,
            (now - begun) / 1e9,
            (ended - begun) / 1e9 if ended else None,
            row[THREAD],
        )


class _Region:
    """A stretch of a record that texts are appended to."""

    def __init__(self, record: Record, start: int, end: int) -> None:
        self._memory, self._start, self._end = record.memory, start, end
        self._next = start

    def append(self, text: str) -> int | None:
        """The offset of ``text``; None if there is no room for it."""
        data = text.encode()[:_LONGEST_TEXT]
        at, after = self._next, self._next + _LENGTH.size + len(data)
        if after > self._end:
            return None
        _LENGTH.pack_into(self._memory, at, len(data))
        self._memory[at + _LENGTH.size : after] = data
        self._next = after
        return at

    def clear(self) -> None:
        self._next = self._start

    @property
    def nbytes(self) -> int:
        """How many have been written."""
        return self._next - self._start


class Texts:
    """Puts texts into a record, each once: as many as a program has lines and lanes."""

    def __init__(self, record: Record) -> None:
        self._region = _Region(record, TEXT_START, DESCRIPTION_START)
        self._known: dict[str, int] = {}
        self._lock = threading.Lock()
        self._full = self.put("(a name; there is no room for more of them)")

    @property
    def nbytes(self) -> int:
        """How many bytes of texts there are."""
        return self._region.nbytes

    def put(self, text: str) -> int:
        """The offset of ``text``, for ever."""
        found = self._known.get(text)
        if found is not None:
            return found
        with self._lock:  # the program and the progress thread both name their calls
            at = self._region.append(text)
            if at is None:
                return self._full
            self._known[text] = at
            return at


class Descriptions:
    """Puts descriptions of calls into a record, for as long as the ring has these calls.

    A half is written anew once the other is full. That has then got more descriptions than the
    ring has calls, so no call in the ring has its description in the half that is given up.
    """

    def __init__(self, record: Record) -> None:
        starts = DESCRIPTION_START, DESCRIPTION_START + _HALF_BYTES
        self._half, self._other = (_Region(record, at, at + _HALF_BYTES) for at in starts)
        self.known: dict[str, int] = {}  # those of the half that is being written
        self._lock = threading.Lock()

    def put(self, text: str) -> int:
        """The offset of ``text``, for the call that begins."""
        with self._lock:
            at = self._half.append(text)
            if at is None:
                self._half, self._other = self._other, self._half
                self._half.clear()
                self.known.clear()
                at = self._half.append(text)
                assert at is not None
            self.known[text] = at
            return at


def create_record(rank: int, size: int) -> tuple[Record, int]:
    """A new record for this process, and its file descriptor."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(NAME)
    else:  # not Linux: nobody else can read it, but this rank reports on itself
        import tempfile

        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, NBYTES)
    os.lseek(fd, STACK_START, os.SEEK_SET)  # where faulthandler goes on
    record = Record(fd)
    header = record.header
    header[AT_PID], header[AT_RANK], header[AT_SIZE] = os.getpid(), rank, size
    header[AT_MAGIC] = MAGIC
    return record, fd
