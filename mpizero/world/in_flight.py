"""Messages under way in this process: who waits without MPI must let MPI move them meanwhile.

An MPI library moves messages when it is asked for them. A rank that waits for others at shared
memory asks too seldom, and they may be waiting for a message to this rank to be taken.
"""

from __future__ import annotations

from typing import Protocol


class Moving(Protocol):
    """A message under way."""

    def done(self) -> bool:
        """Ask MPI, which lets it move; True once it is done."""
        ...


# Each is in here from its start until MPI has said that it is done.
under_way: set[Moving] = set()


def move() -> None:
    """Let MPI move what is under way."""
    for message in [*under_way]:
        message.done()
