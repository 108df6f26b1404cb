"""The exceptions of mpizero: one root, few kinds, each message with its remedy."""

from __future__ import annotations

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
