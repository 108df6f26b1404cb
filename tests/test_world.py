"""Ranks, nodes, sub-worlds; and starting MPI."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from mpi4py import MPI

import mpizero
from mpizero.errors import LaunchError
from mpizero.world.launcher import read_launch, refuse_singleton
from support.launch import mpirun

ranks = pytest.mark.parallel([1, 2, 3, 4])


@ranks
def test_who_and_where() -> None:
    world = mpizero.init()
    assert (world.rank, world.size) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
    assert world.local_rank == world.rank and world.local_size == world.size  # one machine
    assert world.node_ranks == tuple(range(world.size)) and world.node_count == 1
    assert world.node is world and world.node_index == 0 and world.is_leader == (world.rank == 0)
    assert world.thread_level == "multiple" and world.device.kind == "cpu"
    assert f"rank {world.rank} of {world.size}" in repr(world)


@ranks
def test_init_twice_and_with_a_communicator() -> None:
    assert mpizero.init() is mpizero.init()
    mine = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2)
    part = mpizero.init(mine)
    assert part.size == mine.size and part.rank == mine.rank and mpizero.init(mine) is part
    assert part.allreduce(1) == mine.size
    for wrong in (MPI.COMM_NULL, 3):
        with pytest.raises(mpizero.ArgumentError, match="comm"):
            mpizero.init(wrong)  # type: ignore[arg-type]


@ranks
def test_splitting() -> None:
    world = mpizero.init()
    half = world.split(world.rank % 2, key=-world.rank)  # in reverse order
    assert half is not None
    members = [r for r in reversed(range(world.size)) if r % 2 == world.rank % 2]
    assert half.size == len(members) and members[half.rank] == world.rank
    assert half.allreduce(world.rank) == sum(members)
    alone = half.split(half.rank)
    assert alone is not None and alone.size == 1 and alone.allreduce(7) == 7
    some = world.split(0 if world.rank == 0 else None)
    assert (some is None) == (world.rank != 0)
    with pytest.raises(mpizero.ArgumentError, match="color"):
        world.split(-3)
    for part in (some, alone, half):
        if part is not None:
            part.close()


@ranks
def test_a_closed_world_refuses_everything_but_its_arrays_live_on() -> None:
    world = mpizero.init().split(0)
    assert world is not None
    array = world.allocate(1000, np.float64)
    array[...] = 3.0
    handle = world.allreduce(array, asynchronous=True)
    world.close()
    world.close()
    assert (handle.wait() == 3.0 * world.size).all() and (array == 3.0 * world.size).all()
    for use in (lambda: world.allreduce(np.ones(3)), lambda: world.split(0)):
        with pytest.raises(LaunchError, match="has been closed"):
            use()
    comm = MPI.COMM_WORLD.Dup()
    first = mpizero.init(comm)
    first.close()
    second = mpizero.init(comm)
    assert second is not first and second.allreduce(1) == second.size
    second.close()
    comm.Free()


@pytest.mark.parallel([2, 4])
@pytest.mark.parametrize("nodes", ["one", "several"])
def test_closed_worlds_leave_room_for_others(nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPICH has 2048 communicators for a process, windows included; a world takes up to nine."""
    if nodes == "several":
        monkeypatch.setenv("MPIZERO_RANKS_PER_NODE", "1")
    for _ in range(450):
        world = mpizero.init().split(0)
        assert world is not None
        assert world.allreduce(1) == world.size
        world.close()


LAUNCHES = {
    "plain": ({}, None),
    "hydra": ({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}, (1, 4, 1)),
    "openmpi": (
        {
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_SIZE": "8",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        },
        (3, 8, 1),
    ),
    "srun pmi2": (
        {"PMI_RANK": "2", "PMI_SIZE": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"},
        (2, 4, 0),
    ),
    "srun pmix": (
        {
            "SLURM_PROCID": "5",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_NUM_TASKS": "8",
            "PMIX_RANK": "5",
        },
        (5, 8, 1),
    ),
    "batch script": ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 8, None)),
    "mpirun in an allocation": (
        {"SLURM_NTASKS": "8", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        (1, 2, None),
    ),
    "mvapich": (
        {"MV2_COMM_WORLD_RANK": "2", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "0"},
        (2, 4, 0),
    ),
    "nonsense": ({"PMI_RANK": "one", "PMI_SIZE": "many"}, None),
    "jsrun": ({"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "6"}, (1, 6, None)),
    "pals": (
        {"PALS_RANKID": "1", "PALS_SIZE": "2", "PALS_LOCAL_RANKID": "0"},
        (1, 2, 0),
    ),
    "pmix alone": ({"PMIX_RANK": "0"}, (0, None, None)),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launchers_are_recognised(name: str) -> None:
    environ, expected = LAUNCHES[name]
    launch = read_launch(environ)
    found = None if launch is None else (launch.rank, launch.size, launch.local_rank)
    assert found == expected


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("hydra", "mpirun of the MPI"),
        ("openmpi", "rebuild mpi4py"),
        ("srun pmix", "--mpi=pmix"),
        ("batch script", "srun --mpi"),
    ],
)
def test_the_singleton_trap_is_an_error_with_the_remedy(name: str, remedy: str) -> None:
    environ, _ = LAUNCHES[name]
    with pytest.raises(LaunchError, match=remedy) as caught:
        refuse_singleton(read_launch(environ), environ, "Some MPI 1.0")
    assert "Some MPI 1.0" in str(caught.value)
    refuse_singleton(read_launch(environ), {"MPIZERO_ALLOW_SINGLETON": "1"}, "Some MPI 1.0")


def test_one_process_is_no_trap() -> None:
    for environ in ({}, {"PMI_SIZE": "1", "PMI_RANK": "0"}, {"PMIX_RANK": "0"}):
        refuse_singleton(read_launch(environ), environ, "")


TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
TORCH = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
HOROVODRUN = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0"}
SRUN_ONE = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}
MPIRUN_ONE = {"PMI_RANK": "0", "PMI_SIZE": "1"}

# (what stands in the environment, whom the error blames, and of how many processes)
TRAPS: dict[str, tuple[dict[str, str], str, int]] = {
    "torchrun": (TORCHRUN, "torchrun", 4),
    "torchrun on one of several nodes": (
        {**TORCHRUN, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "torchrun", 4
    ),
    "torchrun under srun": ({**TORCHRUN, **SRUN_ONE}, "torchrun", 4),
    "torchrun under srun, a task a node": (
        {**TORCHRUN, **SRUN_ONE, "SLURM_STEP_NUM_TASKS": "2"}, "torchrun", 4
    ),
    "torchrun under mpirun": ({**TORCHRUN, **MPIRUN_ONE}, "torchrun", 4),
    "deepspeed": ({**TORCH, "CROSS_RANK": "0", "CROSS_SIZE": "1"}, "deepspeed", 4),
    "deepspeed in an allocation": ({**TORCH, "SLURM_NTASKS": "1"}, "deepspeed", 4),
    "horovodrun": (HOROVODRUN, "horovodrun", 2),
}  # fmt: skip
HEALTHY: dict[str, dict[str, str]] = {
    "torchrun of one": {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"},
    "left over of one": {"RANK": "0", "WORLD_SIZE": "1"},
    "no rank": {"WORLD_SIZE": "4"},
    "no number": {**TORCH, "WORLD_SIZE": "all"},
    "a rank that cannot be": {**TORCH, "RANK": "4"},
    "mpirun of one, others left over": {**TORCH, **MPIRUN_ONE},
    "a run number left over": {"TORCHELASTIC_RUN_ID": "none"},
    "horovodrun of one": {**HOROVODRUN, "HOROVOD_SIZE": "1"},
}


@pytest.mark.parametrize("name", TRAPS)
def test_launchers_without_mpi_are_named_where_mpi_says_one(name: str) -> None:
    environ, blamed, size = TRAPS[name]
    with pytest.raises(LaunchError, match=rf"{blamed}.* started {size} processes") as caught:
        refuse_singleton(read_launch(environ), environ, "Some MPI 1.0")
    assert f"mpirun -n {size} python" in str(caught.value)
    allowed = {**environ, "MPIZERO_ALLOW_SINGLETON": "1"}
    refuse_singleton(read_launch(allowed), allowed, "Some MPI 1.0")


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_left_over_of_them_is_no_trap(name: str) -> None:
    refuse_singleton(read_launch(HEALTHY[name]), HEALTHY[name], "Some MPI 1.0")


def _fresh_python(program: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return result.stdout


def test_importing_starts_nothing() -> None:
    program = (
        "import sys, mpizero\n"
        "print(sorted({'torch', 'cupy', 'mpi4py.MPI', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    assert _fresh_python(program).strip() == "[]"


@pytest.mark.parallel([2, 3, 4])
def test_a_freed_communicators_world_is_not_given_to_the_next() -> None:
    # MPI gives a freed communicator's handle to the next one that is made.
    for color in (MPI.COMM_WORLD.rank, 0, MPI.COMM_WORLD.rank % 2):
        comm = MPI.COMM_WORLD.Split(color)
        world = mpizero.init(comm)
        assert (world.rank, world.size) == (comm.rank, comm.size)
        assert world.allreduce(1) == comm.size
        comm.Free()


def _thread_level(**environ: str) -> str:
    program = (
        "import mpizero\n"
        "try:\n    world = mpizero.init()\n"
        "except mpizero.ArgumentError as error:\n    print(error)\n"
        "else:\n    print(world.thread_level, world.overlaps)\n"
    )
    result = mpirun(1, program, env=environ)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_thread_level_is_the_environments() -> None:
    # The MPI may grant more than was asked for, but then the thread is not forced upon it.
    assert _thread_level(MPIZERO_PROGRESS="thread") == "multiple True"
    assert _thread_level(MPIZERO_PROGRESS="inline") == "multiple False"
    assert _thread_level(MPIZERO_THREAD_LEVEL="serialized") == "serialized False"
    refused = _thread_level(MPIZERO_THREAD_LEVEL="funneled", MPIZERO_PROGRESS="thread")
    assert "MPIZERO_PROGRESS" in refused and "'funneled'" in refused
    assert "single, funneled" in _thread_level(MPIZERO_THREAD_LEVEL="many")
    assert "auto, thread, inline" in _thread_level(MPIZERO_PROGRESS="fast")
