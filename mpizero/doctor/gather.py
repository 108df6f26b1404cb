"""Facts from all ranks, as far as MPI can be started; it never raises over what is wrong."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpizero.api import World, init
from mpizero.doctor.ask import ask
from mpizero.doctor.facts import Facts, Gpu, Launcher, Mpi, RankFacts, Timings
from mpizero.doctor.host import gpu_numa, host_facts, launchers, mpi_wheels
from mpizero.doctor.watch import Watch
from mpizero.errors import LaunchError
from mpizero.memory.cuda_aware import singleton_environment
from mpizero.world.device import CudaDevice, import_cupy
from mpizero.world.launcher import foreign_launch, read_launch
from mpizero.world.startup import load_mpi

# How long the steps may take at most before the ranks are said to hang. Importing from a busy
# network file system and probing for CUDA-awareness take their time.
_TRIAL_SECONDS, _START_SECONDS, _STEP_SECONDS = 30.0, 300.0, 300.0

_ROUNDS = 5  # of reading all clocks at once

# A process that is MPI for a moment. On some login nodes starting MPI ends the process.
_TRIAL = "from mpi4py import MPI; MPI.COMM_WORLD.Barrier()"


def gather(measure: Callable[[World], Timings] | None = None) -> tuple[Facts | None, World | None]:
    """All facts, on the rank that reports them (None elsewhere), and the World if MPI runs.

    Collective. ``measure`` takes the times; None leaves them out. Where MPI cannot be had, or
    says that this process is alone although the launcher started several, the facts are of this
    process only.
    """
    launch = read_launch(os.environ)
    found = launchers()
    launcher = Launcher(found=found, mpirun_says=_mpirun_says(found))
    if launch is not None:
        launcher = replace(launcher, name=launch.launcher, rank=launch.rank, size=launch.size)
    host = replace(host_facts(), rank=launcher.rank)
    mpi, error = _load()
    trial = _trial() if mpi is not None and launcher.alone else ""
    if mpi is None or trial:
        about = replace(_about(mpi), error=error, loaded=mpi is not None, trial=trial)
        return _of_this_process(Facts((host,), launcher, about))
    who = f"rank {launcher.rank} on {host.host}"
    with Watch(who, os.getpid()) as watch:
        watch.step("starting MPI", _START_SECONDS)
        try:
            world = init()
        except Exception as problem:  # the singleton trap, settings that cannot be had, ...
            about = replace(_about(mpi), error=str(problem), started=bool(mpi.Is_initialized()))
            if foreign := foreign_launch(os.environ, launch):
                launcher = replace(
                    launcher, name=foreign.launcher, rank=foreign.rank, size=foreign.size
                )
            return _of_this_process(Facts((host,), launcher, about))
        return _of_all(world, host, launcher, mpi, measure, watch), world


def _of_this_process(facts: Facts) -> tuple[Facts | None, None]:
    """Every process of a launch finds the same: the first alone says it."""
    return (facts if facts.launcher.rank == 0 else None), None


def _of_all(
    world: World,
    host: RankFacts,
    launcher: Launcher,
    mpi: Any,
    measure: Callable[[World], Timings] | None,
    watch: Watch,
) -> Facts | None:
    watch.step("gathering the facts of all ranks", _STEP_SECONDS)
    library = _first_line(mpi.Get_library_version())
    own = replace(
        host,
        rank=world.rank,
        gpu=_gpu(world),
        versions={**host.versions, "libmpi": library},
        clocks=_clocks(world),
    )
    everyone = world.comm.gather(own.to_json())
    about = replace(
        _about(mpi),
        started=True,
        size=world.size,
        nodes=world.node_count,
        thread_level=world.thread_level,
        built_for_cuda=_built_for_cuda(_path_of_libmpi()),
        cuda_aware=world.cuda_awareness.enabled,
        cuda_reason=world.cuda_awareness.reason,
        nccl_reason=world.device_ways.get("nccl", "some rank has no GPU"),
    )
    timings = None
    if measure is not None:
        watch.step("measuring all-reduce", _STEP_SECONDS)
        timings = measure(world)
    if everyone is None:
        return None
    ranks = tuple(RankFacts.from_json(text) for text in everyone)
    return Facts(ranks, launcher, about, timings)


def _load() -> tuple[Any, str]:
    """mpi4py.MPI, or None and why not."""
    try:
        return load_mpi(), ""
    except LaunchError as error:
        return None, str(error.__cause__ or error)
    except ImportError as error:  # no mpi4py
        return None, str(error)


def _trial() -> str:
    """Why MPI does not start without a launcher; "" if it does."""
    environment = singleton_environment(os.environ)
    status, output = ask([sys.executable, "-c", _TRIAL], _TRIAL_SECONDS, environment)
    if status == 0:
        return ""
    said = output.splitlines()[-1] if output else "it said nothing"
    return said if status is None else f"exit status {status}: {said}"


def _about(mpi: Any) -> Mpi:
    """What is known of the library before it starts."""
    import mpi4py

    wheels = mpi_wheels()
    if mpi is None:
        return Mpi(mpi4py=mpi4py.__version__, wheels=wheels)
    return Mpi(
        library=_first_line(mpi.Get_library_version()),
        path=_path_of_libmpi(),
        mpi4py=mpi4py.__version__,
        wheels=wheels,
    )


def _first_line(version: str) -> str:
    """Open MPI v5.0.11, ...; MPICH 5.0.2, of the first line of its table."""
    lines = version.strip("\0 \n").splitlines() or ["unknown"]
    line = re.sub(r"\s+", " ", lines[0]).strip()
    return line.split(", ")[0].replace("MPICH Version:", "MPICH")


def _path_of_libmpi() -> str:
    """Which file the dynamic linker has mapped; "" where there is no /proc, or none."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return ""
    paths = {line.split(maxsplit=5)[-1] for line in mapped.splitlines()}
    found = sorted(
        p for p in paths if re.fullmatch(r"lib(mpi|mpich|mpi_\w+)\.so[\d.]*", Path(p).name)
    )
    return found[0] if found else ""


def _mpirun_says(found: dict[str, str]) -> str:
    path = found.get("mpirun") or found.get("mpiexec")
    if path is None:
        return ""
    status, output = ask([path, "--version"], 10, singleton_environment(os.environ))
    if status != 0:
        return ""
    # Hydra, MPICH's and Intel's, names itself in the first line and its version in the second.
    return " ".join(re.sub(r"\s+", " ", line).strip() for line in output.splitlines()[:2])


def _built_for_cuda(path: str) -> bool | None:
    """What Open MPI and MPICH say of their build; None for those that say nothing."""
    try:
        return bool(ctypes.CDLL(path).MPIX_Query_cuda_support()) if path else None
    except (OSError, AttributeError):
        return None


def _gpu(world: World) -> Gpu | None:
    device = world.device
    if not isinstance(device, CudaDevice):
        return None
    runtime = import_cupy().cuda.runtime
    name = runtime.getDeviceProperties(device.index)["name"].decode()
    address = str(runtime.deviceGetPCIBusId(device.index))
    return Gpu(name, address, gpu_numa(address))


def _clocks(world: World) -> tuple[float, ...]:
    times = []
    for _ in range(_ROUNDS):
        world.barrier()
        times.append(time.time())
    return tuple(times)
