"""The table from which an algorithm is chosen: measured defaults, or this machine's own.

``mpizero tune`` measures and writes one; it is found again by the MPI library and the shape of the
job (ranks per node, nodes), in ``$XDG_CACHE_HOME/mpizero/tuning.json`` or where ``MPIZERO_TUNING``
says (``off``: nowhere). One rank reads it for all, so that all choose alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpizero import outputs
from mpizero.world.startup import load_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

Rules = tuple[tuple[int, str], ...]  # (up to this many bytes, algorithm), ascending; the last: all

ALL_BYTES = 1 << 62

_SETTING = ("tune", "MPIZERO_TUNING")  # the command, and where users say which file


@dataclass(frozen=True)
class Tuning:
    """For each case (see ``case``) which algorithm up to which size; the size of DDP's buckets."""

    rules: Mapping[str, Rules] = field(default_factory=dict)
    bucket_bytes: int = 25 << 20
    source: str = "built in"

    def algorithm(self, case: str, nbytes: int) -> str | None:
        """The algorithm for a case and size; None if the table does not say."""
        for limit, algorithm in self.rules.get(case, ()):
            if nbytes <= limit:
                return algorithm
        return None


def case(half: bool, shared: bool, one_node: bool) -> str:
    """Name what an all-reduce on host memory is chosen by, beside its size."""
    return "/".join(
        (
            "16-bit" if half else "wide",
            "shared" if shared else "private",
            "one node" if one_node else "several nodes",
        )
    )


def device_case(one_node: bool) -> str:
    """Name what a collective from GPU to GPU is chosen by, beside its size."""
    return "GPU/" + ("one node" if one_node else "several nodes")


# Measured on two cores with the MPICH and Open MPI wheels at 2 and 4 ranks; between nodes, with two
# ranks on each of two, over links of 1 Gbit/s (`benchmarks/between_nodes.py`).
BUILT_IN = Tuning(
    {
        case(False, True, True): ((ALL_BYTES, "node_shared"),),
        case(False, False, True): ((ALL_BYTES, "node_shared"),),
        case(True, True, True): ((ALL_BYTES, "node_shared"),),
        case(True, False, True): ((ALL_BYTES, "node_shared"),),
        case(False, False, False): ((1 << 20, "native"), (ALL_BYTES, "hierarchical")),
        case(True, False, False): ((1 << 20, "native"), (ALL_BYTES, "hierarchical")),
    }
)


def tuning_file() -> Path | None:
    """Where tables are kept; None if ``MPIZERO_TUNING=off``."""
    named = os.environ.get("MPIZERO_TUNING", "")
    if named == "off":
        return None
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "mpizero", "tuning.json")


def job_key(ranks_per_node: int, nodes: int) -> str:
    """What a table is valid for: the MPI library, and ranks per node x nodes."""
    library = str(load_mpi().Get_library_version()).strip("\0 \n")
    first = " ".join(library.splitlines()[0].split(",")[0].split())
    return f"{first}; {ranks_per_node} x {nodes}"


def load(comm: MPI.Intracomm, ranks_per_node: int, nodes: int) -> Tuning:
    """The table for this job, read by rank 0 for all; the built-in one if there is none."""
    found: Tuning = comm.bcast(find(ranks_per_node, nodes) if comm.rank == 0 else None)
    return found


def find(ranks_per_node: int, nodes: int) -> Tuning:
    """The table for such a job, without starting MPI; the built-in one if there is none."""
    return _read(job_key(ranks_per_node, nodes))


def save(tuning: Tuning, ranks_per_node: int, nodes: int) -> Path | None:
    """Keep a table for jobs like this one; returns the file (None: switched off).

    Raises ArgumentError for a file that holds other things.
    """
    path = tuning_file()
    if path is None:
        return None
    tables = _tables(path)
    tables[job_key(ranks_per_node, nodes)] = asdict(tuning)
    path.parent.mkdir(parents=True, exist_ok=True)
    outputs.write(path, json.dumps(tables, indent=1).encode(), _are_tables, *_SETTING)
    return path


def check_file() -> None:
    """Raise ArgumentError if the file that tables are kept in is somebody's for other things."""
    path = tuning_file()
    if path is not None:
        outputs.refuse_foreign(path, _are_tables, *_SETTING)


def _read(key: str) -> Tuning:
    path = tuning_file()
    if path is None:
        return BUILT_IN
    table = _tables(path).get(key)
    return _parsed(table, str(path)) or BUILT_IN


def _parsed(table: Any, source: str) -> Tuning | None:
    """A table as ``save`` has written it; None for anything else."""
    try:
        rules = {
            str(name): tuple((int(limit), str(algorithm)) for limit, algorithm in given)
            for name, given in table["rules"].items()
        }
        return Tuning(rules, int(table["bucket_bytes"]), source)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _are_tables(data: bytes) -> bool:
    try:
        tables = json.loads(data)
    except ValueError:
        return False
    return isinstance(tables, dict) and all(_parsed(each, "") for each in tables.values())


def _tables(path: Path) -> dict[str, Any]:
    """All tables of a file; none if it is missing or not what it should be (it is only a cache)."""
    try:
        tables = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return tables if isinstance(tables, dict) else {}
