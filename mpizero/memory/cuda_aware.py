"""Can this MPI be handed GPU pointers? Found out by doing it, in a process that may die of it.

No MPI says so reliably for the build, the transport and the driver at hand, and handing a device
pointer to an MPI that is not CUDA-aware ends in a segmentation fault. So one rank per node starts
a child process that is an MPI job of its own (one rank, talking to itself), and all ranks take
the worst answer of all nodes: the two ways of moving data cut messages differently, so ranks must
never mix them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpizero.errors import ArgumentError
from mpizero.world.device import CudaDevice, Device, import_cupy
from mpizero.world.group import Group
from mpizero.world.startup import load_mpi

# Above every MPI's eager limit, so that the rendezvous protocol is tried as well.
_PROBE_BYTES = 8 * 1024 * 1024

# Importing CuPy from a busy network file system takes its time.
_PROBE_SECONDS = 120.0

_VERDICT = "mpizero: MPI takes device memory"

# What tells a process which rank of which job it is. A child that inherits it would try to join
# the running job as that rank.
_LAUNCHER_PREFIXES = (
    "PMI_", "PMIX_", "OMPI_", "ORTE_", "PRTE_", "SLURM_", "MPI_LOCAL", "MPIEXEC_", "HYDRA_",
    "HYDI_", "PALS_", "JSM_", "FLUX_", "MV2_COMM_WORLD_", "MPI4PY_RC_",
)  # fmt: skip

# Settings that look like it, but choose the transports that the job itself will use.
_SETTINGS_PREFIXES = ("OMPI_MCA_", "OMPI_ALLOW_RUN_AS_ROOT", "PMIX_MCA_", "PMIX_PREFIX")
_NO_SETTINGS_PREFIXES = (
    "OMPI_MCA_num_procs",
    "OMPI_MCA_initial_wdir",
    "OMPI_MCA_ess",
    "OMPI_MCA_orte",
)


@dataclass(frozen=True)
class CudaAwareness:
    """Whether device arrays go to MPI directly, and why, in words for a person."""

    enabled: bool
    reason: str


Probe = Callable[[CudaDevice], CudaAwareness]


def cuda_aware(group: Group, device: Device, probe: Probe | None = None) -> CudaAwareness:
    """Find out whether all ranks of ``group`` may hand device arrays to MPI. Collective.

    ``MPIZERO_CUDA_AWARE=0|1`` decides it for this rank without a probe (ArgumentError for other
    values); the answer is the worst of all ranks' in any case. Ranks on the host never probe.
    """
    own = _own_answer(group, device, probe or probe_in_child)
    answers: list[CudaAwareness | None] = [own] if group.size == 1 else group.comm.allgather(own)
    given = [(rank, answer) for rank, answer in enumerate(answers) if answer is not None]
    rank, worst = min(given, key=lambda entry: entry[1].enabled)
    if group.size == 1:
        return worst
    return CudaAwareness(worst.enabled, f"rank {rank}: {worst.reason}")


def _own_answer(group: Group, device: Device, probe: Probe) -> CudaAwareness | None:
    """This rank's own answer; None where another rank of the node answers."""
    wish = os.environ.get("MPIZERO_CUDA_AWARE", "")
    if wish not in ("", "0", "1"):
        raise ArgumentError("init()", "MPIZERO_CUDA_AWARE", repr(wish), "0, 1, or unset")
    if not isinstance(device, CudaDevice):
        return CudaAwareness(False, "its device is the host")
    if wish:
        return CudaAwareness(wish == "1", f"MPIZERO_CUDA_AWARE={wish} says so")
    return probe(device) if group.local_rank == 0 else None


def probe_in_child(
    device: CudaDevice, command: Sequence[str] | None = None, seconds: float = _PROBE_SECONDS
) -> CudaAwareness:
    """Transfer device memory with MPI in a child process; never raises.

    A crash, wrong numbers, an exception or no answer within ``seconds`` all mean no. ``command``
    replaces the child's program, which must print the verdict and exit with 0.
    """
    if command is None:
        program = f"from mpizero.memory.cuda_aware import transfer; transfer({device.index})"
        command = (sys.executable, "-c", program)
    try:
        child = subprocess.Popen(
            command,
            env=singleton_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that it can be ended together with what it started
        )
    except OSError as error:
        return CudaAwareness(False, f"the trial transfer could not be started ({error})")
    try:
        output, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return CudaAwareness(False, f"the trial transfer gave no answer within {seconds:g} s")
    return _judge(child.returncode, output)


def _judge(status: int, output: str) -> CudaAwareness:
    if status == 0 and _VERDICT in output:
        return CudaAwareness(True, "a trial transfer of device memory through MPI was right")
    if status < 0:  # what it printed then is a stack dump
        name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
        return CudaAwareness(False, f"the trial transfer crashed ({name})")
    lines = output.strip().splitlines()
    said = f": {lines[-1].strip()}" if lines else ""
    return CudaAwareness(False, f"the trial transfer failed (exit status {status}){said}")


def singleton_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` without what would make a child take itself for a rank of this job."""
    kept = {name: value for name, value in environ.items() if not _names_rank(name)}
    # The parent may have found mpizero by other means than an installation.
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return kept


def _names_rank(name: str) -> bool:
    if name.startswith(_SETTINGS_PREFIXES) and not name.startswith(_NO_SETTINGS_PREFIXES):
        return False
    return name.startswith(_LAUNCHER_PREFIXES)


def transfer(index: int) -> None:
    """The child's part: send and sum memory of GPU ``index`` through MPI, look at the numbers."""
    mpi = load_mpi()
    device = CudaDevice(index, import_cupy())  # before MPI starts, as in a rank
    mpi.Init_thread(mpi.THREAD_MULTIPLE)
    sent = device.empty(_PROBE_BYTES // 4, np.float32)
    for name, exchange in _exchanges(mpi).items():
        received = device.empty(sent.size, np.float32)
        sent[...] = 3.0
        received[...] = -1.0
        device.wait(device.record())
        exchange(sent, received)
        device.synchronize()
        if not (device.to_host(received) == 3.0).all():
            sys.exit(f"{name} of device memory gave wrong numbers")
    sys.stdout.write(_VERDICT + "\n")
    sys.stdout.flush()
    mpi.Finalize()


def _exchanges(mpi: Any) -> dict[str, Callable[[Any, Any], None]]:
    alone = mpi.COMM_SELF
    return {
        "MPI_Sendrecv": lambda sent, received: alone.Sendrecv(sent, 0, 0, received, 0, 0),
        "MPI_Allreduce": lambda sent, received: alone.Allreduce(sent, received),
    }
