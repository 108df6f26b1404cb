"""The jobs of this machine, found by the records that their ranks keep."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mpizero.diagnostics.node import NodeRecords
from mpizero.diagnostics.process import parent_of
from mpizero.diagnostics.record import NAME, Record
from mpizero.diagnostics.views import View

_SCHEDULERS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "COBALT_JOBID")


@dataclass(frozen=True)
class Job:
    """The ranks of a job on this machine: their records, by rank, and where these are opened."""

    records: tuple[Record, ...]
    files: tuple[str, ...]

    @property
    def size(self) -> int:
        """Of the whole job, other machines' ranks too."""
        return self.records[0].size

    @property
    def pids(self) -> list[int]:
        return [record.pid for record in self.records]

    @property
    def names(self) -> set[str]:
        """What an operator may call it: the scheduler's number, and processes' of it."""
        found = {str(pid) for record in self.records for pid in (record.pid, *_above(record.pid))}
        return found | _scheduler_numbers(self.pids[0])

    @property
    def label(self) -> str:
        numbers = sorted(_scheduler_numbers(self.pids[0]))
        return numbers[0] if numbers else str(self.pids[0])

    def look(self) -> list[View]:
        """All of its ranks here, with their stacks; the job's own watchdogs keep quiet meanwhile.

        Raises BlockingIOError if one of them is reporting.
        """
        with ExitStack() as closing:
            nodes = []
            for node in sorted({record.node for record in self.records}):
                at = [n for n, record in enumerate(self.records) if record.node == node]
                claim = os.open(self.files[at[0]], os.O_RDWR)
                closing.callback(os.close, claim)
                ranks = [self.records[n].rank for n in at]
                found = NodeRecords(ranks, [self.records[n] for n in at], claim)
                if not closing.enter_context(found.speak()):
                    raise BlockingIOError("the job is being reported on at this moment")
                nodes.append(found)
            return [view for found in nodes for view in found.look(with_stacks=True)]


def jobs() -> list[Job]:
    """This machine's, as far as the system lets us see them."""
    by_number: dict[int, dict[int, tuple[Record, str]]] = {}
    for pid, file in _candidates():
        record = Record.of_process(pid, int(Path(file).name))
        if record is not None and record.job:
            by_number.setdefault(record.job, {})[record.rank] = record, file
    found = []
    for number in sorted(by_number):
        pairs = [by_number[number][rank] for rank in sorted(by_number[number])]
        found.append(Job(tuple(r for r, _ in pairs), tuple(file for _, file in pairs)))
    return found


def _candidates() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            for link in folder.iterdir():
                if f"memfd:{NAME}" in os.readlink(link):
                    yield int(folder.parent.name), str(link)
        except OSError:  # ended meanwhile, or another user's
            continue


def _above(pid: int) -> list[int]:
    """The processes that started this one: the launcher, the shell."""
    found: list[int] = []
    while pid > 1 and len(found) < 4:
        pid = parent_of(pid)
        found.append(pid)
    return found


def _scheduler_numbers(pid: int) -> set[str]:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return set()
    pairs = (item.decode(errors="replace").partition("=") for item in environment)
    return {value for name, _, value in pairs if name in _SCHEDULERS}
