"""``Job``: what is to be run, on what, for how long; checked before a scheduler sees it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from mpizero.errors import ArgumentError
from mpizero.job.mpis import Mpi

_DURATION = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
# Names go into directives, which every scheduler takes apart at blanks in a way of its own.
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@%+,=-]*")
_PATH = re.compile(r"[A-Za-z0-9_./~@%+=-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Job:
    """A job of ``nodes`` times ``ranks_per_node`` ranks that run ``command``.

    ``seconds``: its time limit. ``memory``: bytes of each node. ``before``: lines of shell ahead of
    the launch, after the ``modules``; ``variables``: of the environment, by name. ``signal``: so
    many seconds before the limit the ranks get SIGUSR1; 0: they do not. ``requeue``: start again
    when the command ends with status 75. ``output``: the file for what the job prints;
    ``script``: the one that the script will be kept in, from the folder of submission.

    Raises ArgumentError for what no scheduler could make sense of.
    """

    command: Sequence[str]
    nodes: int
    ranks_per_node: int
    seconds: int
    mpi: Mpi
    cpus_per_rank: int = 1
    gpus_per_node: int = 0
    memory: float | None = None
    queue: str = ""
    account: str = ""
    name: str = "train"
    modules: Sequence[str] = ()
    before: Sequence[str] = ()
    variables: dict[str, str] = field(default_factory=dict)
    signal: int = 120
    requeue: bool = True
    output: str = ""
    script: str = ""

    def __post_init__(self) -> None:
        if not self.command:
            raise _refused("command", "missing", "what each rank runs, as in -- python train.py")
        for name in ("nodes", "ranks_per_node", "cpus_per_rank"):
            if getattr(self, name) < 1:
                raise _refused(name, str(getattr(self, name)), "a number >= 1")
        if self.gpus_per_node < 0:
            raise _refused("gpus_per_node", str(self.gpus_per_node), "a number >= 0")
        if self.memory is not None and self.memory < MEBIBYTE:
            raise _refused("mem", f"{self.memory:g} bytes", "1 MiB or more of each node")
        if self.seconds < 60:
            raise _refused("time", f"{self.seconds} s", "a minute or more")
        if not 0 <= self.signal < self.seconds:
            allowed = f"0 (none) to less than the job's {self.seconds} s"
            raise _refused("signal", f"{self.signal} s", allowed)
        self._check_texts()

    def _check_texts(self) -> None:
        words = {"queue": self.queue, "account": self.account, "name": self.name}
        for name, text in words.items():
            if (text or name == "name") and not _WORD.fullmatch(text):
                raise _refused(name, repr(text), "letters, digits and _ . : @ % + , = -")
        for module in self.modules:
            if not _PATH.fullmatch(module):
                raise _refused("module", repr(module), "the name of a module")
        for name, text in (("output", self.output), ("script", self.script)):
            if text and not _PATH.fullmatch(text):
                raise _refused(name, repr(text), "a path without blanks and quotes")
        for name in self.variables:
            if not _VARIABLE.fullmatch(name):
                raise _refused("env", repr(name), "NAME=VALUE")

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def file(self) -> str:
        """The name under which the script is submitted."""
        return self.script or f"{self.name}.sh"

    @property
    def clock(self) -> str:
        """The time limit as hours:minutes:seconds, of which there may be more than 24 hours."""
        minutes, seconds = divmod(self.seconds, 60)
        return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"


def seconds_of(text: str) -> int:
    """Of "hours:minutes:seconds" or "days-hours:minutes:seconds".

    Shorter forms mean minutes to one scheduler and hours to another: ArgumentError.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        allowed = "hours:minutes:seconds, such as 4:00:00, or days-hours:minutes:seconds"
        raise _refused("time", repr(text), allowed)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _refused(argument: str, given: str, allowed: str) -> ArgumentError:
    return ArgumentError("job", argument.replace("_", "-"), given, allowed)
