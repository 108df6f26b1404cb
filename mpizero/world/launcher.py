"""What the launcher (mpirun, mpiexec, srun, jsrun, ...) told this process through its environment.

Read before MPI starts: the device must be bound first, and a launcher that speaks of n processes
while MPI counts one is the trap in which every rank trains alone. Launchers that know nothing of
MPI (torchrun) are only asked where MPI counts one: their variables may be there for other reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpizero.errors import LaunchError
from mpizero.world import variables


@dataclass(frozen=True)
class Launch:
    """The process's place in the job, as its launcher says."""

    launcher: str
    rank: int
    size: int | None
    local_rank: int | None
    local_size: int | None = None


@dataclass(frozen=True)
class _Variables:
    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str = ""


# The first whose rank (or size) is set wins: what started the process last stands first, so that
# `mpirun` inside a Slurm allocation is taken for mpirun.
_LAUNCHERS = (
    _Variables(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Variables(
        "MVAPICH's launcher",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    _Variables(
        "jsrun",
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_SIZE",
        "JSM_NAMESPACE_LOCAL_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE",
    ),
    _Variables("PALS' mpiexec", "PALS_RANKID", "PALS_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    _Variables("mpiexec (PMI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Variables("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    _Variables("a Slurm allocation", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    _Variables("a PMIx launcher", "PMIX_RANK", "", ""),
)


@dataclass(frozen=True)
class _Foreign(_Variables):
    """A launcher without MPI. ``mark``: what it alone sets; "" if others set its variables, too."""

    mark: str = ""


_FOREIGN = (
    _Foreign(
        "torchrun (or what calls it: accelerate launch, python -m torch.distributed.run)",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        mark="TORCHELASTIC_RUN_ID",
    ),
    _Foreign(
        "horovodrun without MPI",
        "HOROVOD_RANK",
        "HOROVOD_SIZE",
        "HOROVOD_LOCAL_RANK",
        mark="HOROVOD_SIZE",
    ),
    _Foreign(
        "a launcher for torch (deepspeed, or one that sets RANK and WORLD_SIZE)",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
    ),
)
_FOREIGN_NAMES = frozenset(names.launcher for names in _FOREIGN)
_SLURM = ("srun", "a Slurm allocation")  # within which others start processes of their own


def foreign_launch(environ: Mapping[str, str], launch: Launch | None) -> Launch | None:
    """Who has started several processes without MPI, this one among them; None if nobody has.

    ``launch``: what ``read_launch`` says. Where an mpirun has started this process alone, RANK and
    WORLD_SIZE are left over from something else. What a rank has set for itself is nobody's.
    """
    environ = variables.others(environ)
    for names in _FOREIGN:
        rank, size = _number(environ, names.rank), _number(environ, names.size)
        if rank is None or size is None or size < 2 or rank >= size:
            continue
        alone = launch is not None and launch.size == 1 and launch.launcher not in _SLURM
        if names.mark in environ or (not names.mark and not alone):
            return Launch(names.launcher, rank, size, _number(environ, names.local_rank))
    return None


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """Say who launched this process, or None for a plain ``python``."""
    for names in _LAUNCHERS:
        size = _number(environ, names.size)
        rank = _number(environ, names.rank)
        if size is None and (names.size or rank is None):
            continue
        local = _number(environ, names.local_rank)
        if local is None:  # srun --mpi=pmi2 sets PMI_RANK, but the local rank is Slurm's to tell
            local = _number(environ, "SLURM_LOCALID")
        return Launch(names.launcher, rank or 0, size, local, _number(environ, names.local_size))
    return None


def ranks_can_be_told(launch: Launch | None, environ: Mapping[str, str]) -> bool:
    """Is this process one of the ranks that ``launch`` speaks of, as far as can be seen here?

    A batch script in an allocation is not, nor what another launcher has started from a rank.
    """
    return (
        launch is not None
        and launch.size is not None
        and launch.launcher != "a Slurm allocation"
        and not _marked(environ)
    )


def _marked(environ: Mapping[str, str]) -> bool:
    """Has a launcher without MPI given this process a rank, and left what it alone sets?"""
    given = variables.others(environ)
    return any(names.mark in given and names.rank in given for names in _FOREIGN if names.mark)


def refuse_singleton(launch: Launch | None, environ: Mapping[str, str], library: str) -> None:
    """Stop when the launcher started several processes but MPI says that this one is alone.

    ``library`` is MPI's own version string. Raises LaunchError with the remedy;
    ``MPIZERO_ALLOW_SINGLETON=1`` lets a process run alone on purpose.
    """
    launch = foreign_launch(environ, launch) or launch
    if launch is None or environ.get("MPIZERO_ALLOW_SINGLETON") == "1":
        return
    if mistake := singleton_mistake(launch):
        first_line = library.strip().splitlines()[0] if library.strip() else "unknown"
        raise LaunchError(
            f"{mistake}\nmpi4py has loaded: {first_line}\n{singleton_remedy(launch)}\n"
            "To run this process alone on purpose, set MPIZERO_ALLOW_SINGLETON=1."
        )


def singleton_mistake(launch: Launch) -> str:
    """What is wrong if MPI says that this process is alone; "" if that is as it should be."""
    if launch.size == 1 or (launch.size is None and launch.rank == 0):
        return ""
    count = "several" if launch.size is None else str(launch.size)
    return (
        f"{launch.launcher} started {count} processes (this is rank {launch.rank}), but MPI says "
        "that there is only one: every rank would train alone."
    )


def singleton_remedy(launch: Launch) -> str:
    """What to start instead, or to rebuild, so that the ranks see each other."""
    if launch.launcher in _FOREIGN_NAMES:
        return (
            f"Start the program with `mpirun -n {launch.size} python train.py` (or srun) in its "
            "place: ranks find each other by MPI, and need no other launcher. If nothing of the "
            "kind has started this process, its variables are left over in the environment "
            "(RANK, WORLD_SIZE, ...): unset them."
        )
    if launch.launcher == "a Slurm allocation":
        return (
            "Start the program with `srun --mpi=pmix python ...` (Open MPI) or "
            "`srun --mpi=pmi2 python ...` (MPICH, Intel MPI); plain `python` inside an allocation "
            "starts one process."
        )
    if launch.launcher in ("srun", "a PMIx launcher"):
        return (
            "srun and this MPI do not speak the same protocol. Use `srun --mpi=pmix python ...` "
            "for Open MPI, `srun --mpi=pmi2 python ...` for MPICH and Intel MPI "
            "(`srun --mpi=list` shows what the site offers), or start with the MPI's own mpirun."
        )
    return (
        "The launcher and the MPI that mpi4py loads are different ones. Use the mpirun of the MPI "
        "named above (under srun: --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH and Intel MPI), or "
        "rebuild mpi4py against the launcher's MPI: "
        'MPICC="mpicc -shared" pip install --force-reinstall --no-binary=mpi4py mpi4py'
    )


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "") if name else ""
    return int(text) if text.isdecimal() else None
