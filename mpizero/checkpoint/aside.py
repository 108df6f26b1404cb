"""Memory for copies that are written later, kept from one asynchronous save to the next.

A system gives memory to a process page by page, when each is first touched, which can take ten
times as long as copying into memory that is there (0.8 GB/s against 9, on a virtual machine).
Training waits for the copy, so what one save has had the next one gets.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

_ALIGNMENT = 64  # bytes: a cache line


class Aside:
    """One block of memory, which arrays are copied into one behind the other."""

    def __init__(self, nbytes: int) -> None:
        self._memory = _spare.take(nbytes)
        self._end = 0

    @staticmethod
    def room_for(values: np.ndarray[Any, Any]) -> int:
        """Bytes of an array, and some to let the next one be aligned."""
        return -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT

    def put(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A copy of a 1-D array."""
        room = self._memory[self._end : self._end + values.nbytes]
        place: np.ndarray[Any, Any] = room.view(values.dtype)
        place[:] = values
        self._end += self.room_for(values)
        return place

    def give_back(self) -> None:
        """Nobody reads the copies any more."""
        memory, self._memory = self._memory, np.empty(0, np.uint8)
        if memory.size:
            _spare.keep(memory)


class _Spare:
    """The block that the last save has had, if it is free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # saves end in threads of their own
        self._memory: np.ndarray[Any, Any] | None = None

    def take(self, nbytes: int) -> np.ndarray[Any, Any]:
        if nbytes == 0:
            return np.empty(0, np.uint8)
        with self._lock:
            found, self._memory = self._memory, None
        # One that is much too large is given back to the system.
        if found is not None and nbytes <= found.size <= 2 * nbytes:
            return found
        return np.empty(nbytes, np.uint8)

    def keep(self, memory: np.ndarray[Any, Any]) -> None:
        with self._lock:
            self._memory = memory


_spare = _Spare()
