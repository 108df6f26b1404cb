"""Names in /dev/shm: MPI's own are taken away when it has started, the users' stay."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpizero.world import segments
from support.launch import find_mpirun, is_openmpi, mpirun

SHM = Path("/dev/shm")

# As both MPIs call theirs, and as users may.
NAMES = ("mpich_shm_0123abcd_0", "sm_segment.host.0.0123.0", "vader_segment.host.1", "data.bin")

# The users' files are there and mapped, by all ranks, before MPI starts; one is mapped by another
# thread while it does. What has a name afterwards, and is mapped, is told by each rank.
PROGRAM = """
import mmap, os, sys, threading, time
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
folder, prefix, how = Path("/dev/shm"), sys.argv[1], sys.argv[2]
paths = [folder / name for name in sys.argv[3:]]
if rank == 0:
    for path in paths:
        path.with_name(path.name + ".tmp").write_bytes(b"x" * 4096)
        path.with_name(path.name + ".tmp").rename(path)
while not all(path.exists() for path in paths):
    time.sleep(0.01)
maps = [mmap.mmap(os.open(path, os.O_RDWR), 4096) for path in paths[:-1]]
block = shared_memory.SharedMemory(f"sm_segment.{prefix}.{rank}", create=True, size=4096)
resource_tracker.unregister(block._name, "shared_memory")

if how == "mpi first":
    from mpi4py import MPI
import mpizero
from mpizero.world import segments


if how == "fails":
    from mpizero.api import init
    def fail(*_):
        raise ValueError("no World")
    init.World = fail
    try:
        mpizero.init()
    except ValueError:
        pass
    world = None
else:
    world = mpizero.init(elastic=how == "elastic")
maps.append(mmap.mmap(os.open(paths[-1], os.O_RDWR), 4096))
if world is not None:
    world.barrier()
named = [path for path in set(segments._mapped().values()) if Path(path).exists()]
sys.stdout.write(f"rank {rank} maps {' '.join(sorted(Path(path).name for path in named))}\\n")
sys.stdout.flush()
if world is None:
    from mpi4py import MPI
    MPI.COMM_WORLD.Barrier()
"""


@pytest.fixture
def prefix() -> Iterator[str]:
    prefix = uuid.uuid4().hex
    yield prefix
    for path in SHM.glob(f"*{prefix}*"):
        path.unlink()


def told(ranks: int, prefix: str, how: str) -> dict[int, list[str]]:
    """What each rank maps that has a name when MPI has started, beside the users' files."""
    users = [f"{name}.{prefix}" for name in NAMES]
    options = ["--with-ft", "ulfm"] if how == "elastic" else []
    result = mpirun(ranks, ["-c", PROGRAM, prefix, how, *users], mpi_args=options)
    assert result.returncode == 0, result.stderr
    blocks = [f"sm_segment.{prefix}.{rank}" for rank in range(ranks)]
    there = {each.name for each in SHM.iterdir()}
    assert set(users + blocks) <= there, "the users' files are gone"
    found = {}
    for line in result.stdout.splitlines():
        if line.startswith("rank "):
            _, rank, _, *names = line.split()
            own = [*users, blocks[int(rank)]]
            assert set(own) <= set(names)
            found[int(rank)] = [name for name in names if name not in own]
    assert sorted(found) == list(range(ranks))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_users_files_stay_and_mpis_lose_their_names(ranks: int, prefix: str) -> None:
    assert told(ranks, prefix, "usual") == {rank: [] for rank in range(ranks)}


def test_where_mpi_had_been_started_before_nothing_is_taken_for_its_own(prefix: str) -> None:
    assert all(told(2, prefix, "mpi first").values())


def test_a_start_that_fails_takes_mpis_names_with_it(prefix: str) -> None:
    assert told(2, prefix, "fails") == {0: [], 1: []}


@pytest.mark.skipif(not is_openmpi(find_mpirun(sys.executable)), reason="needs ULFM")
def test_the_users_files_stay_in_a_job_that_survives_deaths(prefix: str) -> None:
    assert told(2, prefix, "elastic") == {0: [], 1: []}


def mapped(path: Path) -> mmap.mmap:
    path.write_bytes(b"x" * 4096)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 4096)


@pytest.mark.once
def test_of_another_process_goes_only_what_it_has_got_by_starting_mpi(prefix: str) -> None:
    """Of one that is about to be killed: MPI's may be called so, and the users' as well."""
    names = ["sm_segment.before", "sm_segment.since", "data.since", "sm_segment.replaced"]
    paths = [SHM / f"{name}.{prefix}" for name in names]
    maps = [mapped(paths[0])]
    with segments.noted():
        maps += [mapped(path) for path in paths[1:]]
    paths[3].unlink()
    paths[3].write_bytes(b"another file of that name")
    other = [sys.executable, "-c", "import sys; from mpizero.world import segments; "
             "segments.remove_segments(int(sys.argv[1]))"]  # fmt: skip
    subprocess.run([*other, str(os.getpid())], check=True, timeout=60)
    assert [path.exists() for path in paths] == [True, False, True, True]
    assert segments._start is not None
    os.close(segments._start.handle)  # MPI has started
    segments._start = None
    maps.append(mapped(paths[1]))
    subprocess.run([*other, str(os.getpid())], check=True, timeout=60)
    assert paths[1].exists()
    for each in maps:
        each.close()
