"""The exceptions of mpizero: one root, few kinds, each message with its remedy."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class MpizeroError(Exception):
    """Root of everything that mpizero raises on its own account.

    ``reported_elsewhere``: every rank of a group raises the same error, and another one than this
    rank is to print its traceback.
    """

    reported_elsewhere: bool = False

    def told_by(self, this_rank: bool) -> Self:
        """The same error, to be raised: does ``this_rank`` print it?

        Raised from a variable it would refer to its function's frame, and that to it: all that is
        in there would stay until Python looks for cycles.
        """
        self.reported_elsewhere = not this_rank
        return self


class LaunchError(MpizeroError, RuntimeError):
    """The job was started in a way in which it cannot be right (or MPI is missing)."""


class ArgumentError(MpizeroError, ValueError):
    """An argument that cannot be used: names it, what was given and what is allowed."""

    def __init__(
        self, function: str, argument: str, given: str, allowed: str, hint: str = ""
    ) -> None:
        self.function, self.argument, self.given, self.allowed = function, argument, given, allowed
        message = f"{function}: argument '{argument}' is {given}; allowed: {allowed}."
        super().__init__(f"{message} {hint}".rstrip())


class MismatchError(MpizeroError, RuntimeError):
    """Ranks disagree about what they are doing: names the ranks and what each did."""


class RankDiedError(MpizeroError, RuntimeError):
    """A rank of the job has died, in a job that may survive it (``init(elastic=True)``)."""


class CheckpointError(MpizeroError, RuntimeError):
    """A checkpoint that could not be written or read: says why, on which rank, in which file."""


def settle(error: BaseException, group: int) -> None:
    """Note that the ranks of a group (by its number) know of ``error``, or cannot be told."""
    with suppress(AttributeError):  # an error that takes no notes
        error.__dict__.setdefault("_settled_in", []).append(group)


def unsettle(error: BaseException, group: int) -> None:
    """Forget that again."""
    noted = getattr(error, "_settled_in", [])
    while group in noted:
        noted.remove(group)


def is_settled(error: BaseException | None, group: int) -> bool:
    """Has it been noted of ``error``, or of what it was raised from?"""
    while error is not None:
        if isinstance(error, RankDiedError) or group in getattr(error, "_settled_in", ()):
            return True
        error = error.__cause__
    return False


def in_words(error: BaseException) -> str:
    """An error for the other ranks: one of our own says it all, others are named."""
    try:
        text = str(error)
    except Exception:  # of the user's making
        text = ""
    if isinstance(error, MpizeroError):
        return text
    kind = type(error).__name__
    return f"{kind}: {text}" if text else kind
