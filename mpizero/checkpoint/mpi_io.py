"""Writing one file in concert through MPI-IO (MPI 4.1, chapter 14).

On parallel file systems, writers that touch the same stripe wait for each other's locks. In a
collective write MPI hands neighbouring bytes to few ranks, which write whole stripes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Those for which ROMIO and OMPIO have drivers that know stripes.
PARALLEL = frozenset({"gpfs", "lustre", "panfs", "pvfs2"})


def file_system(folder: Path, mounts: str = "/proc/self/mounts") -> str:
    """The type of the file system that a folder lies on, as Linux calls it; "" if unknown."""
    try:
        lines = Path(mounts).read_text().splitlines()
    except OSError:
        return ""
    where = folder.resolve()
    found, longest = "", -1
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if (where == Path(point) or Path(point) in where.parents) and len(point) >= longest:
            found, longest = kind, len(point)
    return found


def write_together(comm: Any, path: Path, ranges: Sequence[tuple[int, Any]]) -> None:
    """Write each rank's ``ranges`` (first byte, data) of a file that exists. Collective.

    A rank that cannot write takes part in what the others still have to do, and raises then.
    Raises OSError.
    """
    from mpi4py import MPI

    nothing = (0, np.empty(0, np.uint8))
    failure: MPI.Exception | None = None
    try:
        handle = MPI.File.Open(comm, os.fspath(path), MPI.MODE_WRONLY)
    except MPI.Exception as error:
        failure = error
    # Not every MPI tells the others. Closing would be collective too, so a file that only some
    # ranks could open stays open.
    if comm.allreduce(failure is not None, MPI.LOR):
        raise OSError(f"MPI-IO cannot open {path}: {failure or 'on another rank'}")
    for turn in range(comm.allreduce(len(ranges), MPI.MAX)):
        place, data = ranges[turn] if turn < len(ranges) else nothing
        try:
            handle.Write_at_all(place, data)
        except MPI.Exception as error:
            failure = failure or error
    for finish in (handle.Sync, handle.Close):
        try:
            finish()
        except MPI.Exception as error:
            failure = failure or error
    if failure is not None:
        raise OSError(f"MPI-IO cannot write {path}: {failure}")
