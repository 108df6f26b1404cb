"""Where a loop over the data is: in which epoch, and how much of it all ranks have been given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpizero import ArgumentError


class Position:
    """``epoch`` under way, or the next, and ``done``: what was handed out of it, over all ranks.

    Every ``begin`` begins the epoch after the last one begun. A loop that is left by ``break`` has
    not finished its epoch: the position stays behind the last that it was given.
    """

    def __init__(self) -> None:
        self.epoch = self.done = 0
        self._next = 0
        self._restored = False

    def begin(self) -> None:
        """A loop begins: the restored epoch where it stopped, else the next one."""
        if not self._restored:
            self.epoch, self.done = self._next, 0
        self._restored = False
        self._next = self.epoch + 1

    def advance(self, epoch: int, done: int) -> None:
        """So much of ``epoch`` has been handed out."""
        self.epoch, self.done = epoch, done

    def finish(self, epoch: int) -> None:
        """All of ``epoch`` has been handed out, and its loop has ended."""
        self.epoch, self.done = epoch + 1, 0

    def set_epoch(self, epoch: int) -> bool:
        """Let the next loop begin ``epoch``; False if it goes on in just that one, restored."""
        if self._restored and epoch == self.epoch:
            return False
        self.epoch, self.done = epoch, 0
        self._next, self._restored = epoch, False
        return True

    def restore(self, state: Mapping[str, Any], unit: str) -> None:
        """Let the next loop go on where a ``state`` with "epoch" and ``unit`` says."""
        epoch, done = state.get("epoch"), state.get(unit)
        for name, value in (("epoch", epoch), (unit, done)):
            if type(value) is not int or value < 0:
                raise ArgumentError("load_state_dict()", f"state[{name!r}]", repr(value), "a count")
        assert epoch is not None and done is not None
        self.epoch, self.done, self._restored = epoch, done, True
