"""``Fault``: something that happens to a job, and what is promised then.

It is let happen by ``support.faulty_program`` and judged by ``support.fault_judge``.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

ENDS = "ends"  # within 10 seconds, with a status that is not zero, and says why
GOES_ON = "goes on"  # to its end, with status 0

MPICH, OPEN_MPI = "MPICH", "Open MPI"

# Options of the training: the steps, and the one that it happens in or after.
_DEFAULTS = {
    "steps": 7, "step": 3, "asynchronous": False, "catches": False, "stage": 0, "zero": {},
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One thing that happens to a job.

    ``act`` to ``who`` (ranks, -1 the last) at a ``moment`` of a ``training``: "arrays" (the core
    alone, which then make a ``call`` in every step), "ddp", "zero1" to "zero3", or "elastic" with a
    ``stage``. ``says``: patterns of lines to be printed; where MPIs' launchers say it, of theirs.
    """

    name: str
    act: str
    moment: str = "before"
    training: str = "arrays"
    who: tuple[int, ...] = (-1,)
    ranks: int = 3
    call: str = "allreduce"
    thread: bool = False  # communication on a thread beside the compute
    promise: str = ENDS
    says: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    launcher_arguments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    around: tuple[str, ...] = ()  # words in front of each rank's command
    limit: float = 10.0  # seconds until it must have ended
    alone: bool = False  # not by mpirun
    options: Mapping[str, Any] = field(default_factory=dict)  # of the training
    memory: int = 0  # bytes that all ranks have together
    shared: str = ""  # size of /dev/shm
    disk: str = ""  # size of the file system that checkpoints are written to
    saves: bool = False  # is started again afterwards, and goes on from a checkpoint
    only: str = ""  # with this MPI
    short: bool = False  # part of `make test`

    @property
    def culprits(self) -> list[int]:
        return [rank % self.ranks for rank in self.who]

    @property
    def config(self) -> dict[str, Any]:
        """What the program is told."""
        own = ("act", "moment", "training", "call")
        defaults = {
            "steps": 7,
            "step": 3,
            "asynchronous": False,
            "catches": False,
            "stage": 0,
            "zero": {},
        }
        return {
            **defaults, **{name: getattr(self, name) for name in own},
            "ranks": self.culprits, **self.options,
        }  # fmt: skip

    @property
    def dies(self) -> bool:
        """Do the culprits not come to the end, where the others go on?"""
        return self.training == "elastic"

    @property
    def where(self) -> str:
        """In which training, and when, to which ranks."""
        of = self.training
        if of == "arrays":
            of = _CALLS[self.call]
        elif of == "elastic":
            of = f"elastic, stage {self.options.get('stage', 0)}"
        ranks = "all" if len(self.who) == self.ranks else ", ".join(map(str, self.culprits))
        thread = ", overlap" if self.thread else ""
        nodes = self.env.get("MPIZERO_RANKS_PER_NODE")
        count = f"{self.ranks}" + (f" on {self.ranks // int(nodes)} nodes" if nodes else "")
        return f"{of}{thread}; {self.moment}; rank {ranks} of {count}"

    def without(self) -> Fault:
        """The same job, to which nothing happens."""
        return replace(self, who=(), promise=GOES_ON, says=(), saves=False)


_CALLS = {
    "allreduce": "all-reduces", "asynchronous": "asynchronous all-reduces",
    "broadcast": "broadcasts", "large": "all-reduces of 16 MiB",
    "node_shared": "node-shared all-reduces of 16 MiB",
}  # fmt: skip


def signalled(number: signal.Signals) -> str:
    """How the launchers say that a signal has ended a rank."""
    said = {4: "Illegal instruction", 6: "Aborted", 7: "Bus error", 9: "Killed"}
    text = {**said, 11: "Segmentation fault", 15: "Terminated"}[number]
    return rf"(?:{text} \(signal {number}\)|signal {number} \({text}\))"
