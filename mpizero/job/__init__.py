"""Job scripts for Slurm, PBS and LSF: resources, binding, leaving in time, starting again.

``Job`` says what is wanted, ``script`` writes it down in a scheduler's words; ``mpizero job`` is
its command. tests/test_job.py runs what comes out under a real Slurm.
"""

from __future__ import annotations

from collections.abc import Callable

from mpizero.errors import ArgumentError
from mpizero.job import lsf, pbs, slurm
from mpizero.job.job import Job, seconds_of
from mpizero.job.mpis import MPIS, Mpi, loaded_mpi

SCHEDULERS: dict[str, Callable[[Job], str]] = {
    "slurm": slurm.script,
    "pbs": pbs.script,
    "lsf": lsf.script,
}


def script(scheduler: str, job: Job) -> str:
    """The text of a script to be submitted. Raises ArgumentError for an unknown scheduler."""
    if scheduler not in SCHEDULERS:
        raise ArgumentError("job", "scheduler", repr(scheduler), ", ".join(SCHEDULERS))
    return SCHEDULERS[scheduler](job)


__all__ = ["MPIS", "SCHEDULERS", "Job", "Mpi", "loaded_mpi", "script", "seconds_of"]
