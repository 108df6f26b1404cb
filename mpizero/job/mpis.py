"""What the common MPIs want to be told: by srun, by options of their launchers, by variables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mpizero.errors import ArgumentError, LaunchError
from mpizero.world.startup import load_mpi

# ranks, ranks per node, cores per rank -> a launcher, and its options
_Launch = Callable[[int, int, int], list[str]]


@dataclass(frozen=True)
class Mpi:
    """An MPI. ``srun``: the protocol that it speaks with Slurm's srun (``--mpi=``); ``launch``: its
    own launcher within an allocation of another scheduler, which binds each rank to its cores.

    ``mark``: what its library calls itself. ``variables``: to be set in any case; ``on_gpus``: for
    it to take device memory (those that say so at run time: others decide it when they are built).
    """

    name: str
    srun: str
    launch: _Launch
    mark: str
    variables: dict[str, str] = field(default_factory=dict)
    on_gpus: dict[str, str] = field(default_factory=dict)


def _open_mpi(ranks: int, per_node: int, cores: int) -> list[str]:
    place = ["--map-by", f"ppr:{per_node}:node:PE={cores}", "--bind-to", "core"]
    return ["mpirun", "-n", str(ranks), *place]


def _hydra(ranks: int, per_node: int, cores: int) -> list[str]:
    return ["mpiexec", "-n", str(ranks), "-ppn", str(per_node), "-bind-to", f"core:{cores}"]


def _intel(ranks: int, per_node: int, _: int) -> list[str]:
    return ["mpiexec", "-n", str(ranks), "-ppn", str(per_node)]


def _pals(ranks: int, per_node: int, cores: int) -> list[str]:
    place = ["--ppn", str(per_node), "--depth", str(cores), "--cpu-bind", "depth"]
    return ["mpiexec", "-n", str(ranks), *place]


# In the order in which their marks are looked for: those derived from MPICH may name it, too.
_KNOWN = (
    Mpi(
        "openmpi", "pmix", _open_mpi, "Open MPI",
        on_gpus={"OMPI_MCA_opal_cuda_support": "true"},  # Open MPI 4; 5 finds out by itself
    ),
    Mpi("cray", "cray_shasta", _pals, "CRAY MPICH", on_gpus={"MPICH_GPU_SUPPORT_ENABLED": "1"}),
    Mpi(
        "intel", "pmi2", _intel, "Intel(R) MPI",
        # As many cores for each rank as it has threads.
        variables={"I_MPI_PIN_DOMAIN": "omp"}, on_gpus={"I_MPI_OFFLOAD": "1"},
    ),
    Mpi(
        "mvapich", "pmi2", _hydra, "MVAPICH",
        # Its own binding would take away the thread level that overlap needs.
        variables={"MV2_ENABLE_AFFINITY": "0", "MVP_ENABLE_AFFINITY": "0"},
        on_gpus={"MV2_USE_CUDA": "1", "MVP_USE_CUDA": "1"},
    ),
    Mpi("mpich", "pmi2", _hydra, "MPICH", on_gpus={"MPIR_CVAR_ENABLE_GPU": "1"}),
)  # fmt: skip

MPIS = {each.name: each for each in _KNOWN}


def mpi_of(library: str) -> Mpi | None:
    """Which of them a library is, by what it says of itself; None if it is none of them."""
    return next((each for each in _KNOWN if each.mark.lower() in library.lower()), None)


def loaded_mpi() -> Mpi:
    """The one that mpi4py loads here, without starting it.

    Raises ArgumentError where there is none, or none that is known.
    """
    try:
        library = load_mpi().Get_library_version().strip()
    except LaunchError:
        library = ""
    found = mpi_of(library)
    if found is None:
        given = repr(library.splitlines()[0]) if library else "not given, and none is loaded here"
        raise ArgumentError("job", "mpi", given, ", ".join(MPIS))
    return found
