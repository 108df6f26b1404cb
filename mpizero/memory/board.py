"""The ranks of a node exchange short notes, in step: a barrier that carries data.

MPI's barrier tells nothing but that all have come, and spins while they have not. Where ranks share
memory a counter for each of them does the same, and what stands beside it (who means to do what,
where an array lies, a small array itself) is known to all when they have come.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpizero.memory.node_shared import PAGE, NodeMemory, Shared
from mpizero.world import in_flight, shared_cores
from mpizero.world.survival import watch

# What a rank can show with a note. Large enough to make an exchange cheap beside it, small enough
# for all ranks' payloads to stay in a shared cache. Where there is no room for that, less.
PAYLOAD_BYTES = (1 << 20, 64 << 10, 8 << 10)

# A rank's stage, where its private memory passes through, in parts of a payload. What is combined
# at a time (the array, what was staged of it, what others have staged) is to stay in a core's own
# cache. (Measured from 1 to 64 MB on cores with 2 MiB: 256 KB, 512 KB and 1 MB all within 8 %,
# 2 MB 10 to 50 % slower.)
_STAGE_PART = 2

# A board takes no more than this part of the room that there is: arrays want it too.
_SHARE = 1 / 4

# Three pages in turn. Whoever posts on one again has seen all ranks post on the one before, which
# they do only when they have read what was shown on this one, also a step after it was.
PAGES = 3

_LINE_BYTES = 64  # a cache line: a rank that posts disturbs nobody who reads another's note

# After so many looks the wait is no short one: from then on give the core away between looks, and
# in the end take naps that are short beside what has been waited for already.
_EAGER_LOOKS, _YIELDING_LOOKS, _NAP_SECONDS = 2_000, 20_000, 100e-6

# Where ranks outnumber cores, every so many looks sleep for as short as can be: the scheduler may
# answer a yield by running the same rank again, for milliseconds. (Measured with 4 ranks on 2 cores
# after other work, 64 B to 4 KB: 80 to 120 us a call, without this 140 to 280.)
_LOOKS_BEFORE_SLEEP = 20

# Every so many looks let MPI move messages, and in a job that survives deaths ask whether anybody
# has died. A thread beside the compute naps then.
_LOOKS_BEFORE_CHECK = 50


@dataclass(frozen=True)
class Page:
    """One exchange: ``notes[r]`` holds rank r's counter and two integers, ``payloads[r]`` bytes.

    Both may be read until this rank's next exchange but one.
    """

    notes: tuple[memoryview, ...]
    payloads: tuple[Any, ...]
    own: memoryview


class Board:
    """The notes of all ranks of a node. Belongs to one thread of each rank at a time."""

    def __init__(
        self,
        window: Shared,
        rank: int,
        crowded: bool,
        check: Callable[[], None] | None = None,
        stage_bytes: int = 0,
    ) -> None:
        self.rank, self.size = rank, len(window.parts)
        self._sync = window.sync
        self._check = check  # raises if one of those waited for can never come
        self._crowded = crowded  # more ranks than cores: waiting must not burn a time slice
        page_bytes = (len(window.own) - stage_bytes) // PAGES
        self.payload_bytes = page_bytes - PAGE
        self.pages = tuple(_page(window, rank, at * page_bytes, page_bytes) for at in range(PAGES))
        # Every rank's room beside the pages, whose use is a matter of those who use it.
        self.stages = tuple(part[PAGES * page_bytes :] for part in window.parts)
        self.count = 0  # of exchanges so far; the next one is on page ``count % PAGES``

    @classmethod
    def open(cls, memory: NodeMemory, crowded: bool) -> Board | None:
        """A board for the ranks of ``memory``; None where there is no room. Collective."""
        for payload_bytes in PAYLOAD_BYTES:
            stage_bytes = payload_bytes // _STAGE_PART
            window = memory.window(PAGES * (PAGE + payload_bytes) + stage_bytes, _SHARE)
            if window is not None:
                return cls(window, memory.comm.rank, crowded, watch(memory.comm), stage_bytes)
        return None

    @property
    def next(self) -> Page:
        """Where the next exchange takes place: a payload is put there before it."""
        return self.pages[self.count % PAGES]

    def exchange(self, first: int = 0, second: int = 0) -> Page:
        """Post a note, and wait for everyone's. What each rank has stored before, all see after.

        A counter orders the ranks; MPI_Win_sync on both sides of it orders their loads and stores
        (MPI 4.1, section 12.7), without which a CPU that reorders them could show old values.
        """
        count = self.count
        page = self.pages[count % PAGES]
        self.count = count = count + 1
        own = page.own
        own[1], own[2] = first, second
        self._sync()
        own[0] = count  # aligned 8 bytes: stored at once
        for note in page.notes:
            if note[0] != count:
                self._wait(note, count)
        self._sync()
        return page

    def _wait(self, note: memoryview, count: int) -> None:
        """Until ``note`` is of exchange ``count``. MPI's sync also lets other threads run."""
        looks = 0
        while note[0] != count:
            looks += 1
            if looks % _LOOKS_BEFORE_CHECK == 0:
                if self._check is not None:
                    self._check()
                if in_flight.under_way:
                    in_flight.move()
                if shared_cores.shares():
                    time.sleep(_NAP_SECONDS)
            if looks > _YIELDING_LOOKS:
                time.sleep(_NAP_SECONDS)
            elif self._crowded and looks % _LOOKS_BEFORE_SLEEP == 0:
                time.sleep(0)
            elif self._crowded or looks > _EAGER_LOOKS:
                os.sched_yield()
            self._sync()


def _page(window: Shared, rank: int, start: int, nbytes: int) -> Page:
    lines = [part[start : start + _LINE_BYTES].view(np.int64) for part in window.parts]
    notes = tuple(line.data for line in lines)
    payload = slice(start + PAGE, start + nbytes)
    return Page(notes, tuple(part[payload] for part in window.parts), notes[rank])
