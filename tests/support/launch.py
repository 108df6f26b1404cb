"""Starting ``mpirun`` with either MPI, from anywhere, so that nothing of it outlives its time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# The suite is run on each of these numbers of ranks.
RANK_COUNTS = (1, 2, 3, 4)

# By these a process believes that it is a rank of some job. A process that has started MPI (as
# mpi-pytest's does) hands them to its children, whose own `mpirun` then goes astray.
_LAUNCHER_PREFIXES = ("HYDI_", "HYDRA", "MPIR_", "MPI_LOCAL", "OMPI_", "PMIX_", "PMI_", "PRTE_")

# Open MPI refuses root and more ranks than cores unless told otherwise; its ranks must yield the
# cores they share; and its UCX windows print a warning on machines without that hardware.
_OPENMPI_ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
_OPENMPI_OPTIONS = (
    *("--oversubscribe", "--bind-to", "none"),
    *("--mca", "osc", "^ucx", "--mca", "mpi_yield_when_idle", "1"),
)

_TERM_SECONDS = 5.0


@dataclass(frozen=True)
class Finished:
    """A launch that has ended: like ``subprocess.CompletedProcess``, and how long it took."""

    args: Sequence[str]
    returncode: int
    stdout: str
    stderr: str
    seconds: float


class LaunchTimeoutError(Exception):
    """A launch did not end in time and was killed; ``finished`` holds what it had printed."""

    def __init__(self, finished: Finished) -> None:
        self.finished = finished
        super().__init__(
            f"killed after {finished.seconds:.0f} s: {' '.join(finished.args)}\n"
            f"--- stdout\n{finished.stdout}\n--- stderr\n{finished.stderr}"
        )


def mpirun(
    n: int,
    program: str | Path | Sequence[str],
    timeout: float = 60,
    env: Mapping[str, str | None] | None = None,
    mpi_args: Sequence[str] = (),
) -> Finished:
    """Run a Python program on ``n`` ranks and wait for its end.

    ``program`` is source text, the path of a script, or a list of arguments to ``python``.
    ``env`` adds variables (None takes one away), ``mpi_args`` options of ``mpirun``. Raises
    LaunchTimeoutError, after killing all ranks, when the launch has not ended in ``timeout``
    seconds.
    """
    arguments = _python_arguments(program)
    command = [*mpirun_command(sys.executable, n, mpi_args), sys.executable, *arguments]
    environment = launch_environment(env)
    return run(command, environment, timeout)


def run(command: Sequence[str], environment: Mapping[str, str], timeout: float) -> Finished:
    """Run a command that starts ranks, as ``mpirun`` does one."""
    # Files, not pipes: whoever holds a pipe open could keep us waiting after the launch's end.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.monotonic()
        late = False
        with started(command, env=environment, stdout=out, stderr=err) as process:
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                late = True
        seconds = time.monotonic() - start
        out.seek(0)
        err.seek(0)
        finished = Finished(command, process.returncode, out.read(), err.read(), seconds)
    if late:
        raise LaunchTimeoutError(finished)
    return finished


def mpirun_command(python: str, n: int, mpi_args: Sequence[str] = ()) -> list[str]:
    """``mpirun -n N`` with what its MPI needs here: the one beside ``python``, else on the path."""
    launcher = find_mpirun(python)
    options = _OPENMPI_OPTIONS if is_openmpi(launcher) else ()
    return [launcher, "-n", str(n), *options, *mpi_args]


def launch_environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment less its place in an MPI job, fit for starting ``mpirun``."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_PREFIXES)
    }
    environment.pop("PYTHONUNBUFFERED", None)  # with it, lines of several ranks mix when printed
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or each rank compiles the package anew
    environment.update(_OPENMPI_ENVIRONMENT)
    environment["OMP_NUM_THREADS"] = "1"
    # The checkout comes first, installed or not.
    search = [str(ROOT), str(ROOT / "adapters"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, search))
    for name, value in (changes or {}).items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
    return environment


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a process as the head of its own group; on leaving, nothing of the group is left."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, text=True, **options
    )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    """End a process started by ``started``, and its group. Politely first: so ranks go too."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_TERM_SECONDS)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def find_mpirun(python: str) -> str:
    """The ``mpirun`` that belongs to a Python: beside it (the wheels), else the machine's own."""
    beside = Path(python).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise FileNotFoundError(f"no mpirun beside {python} nor on the PATH: install an MPI")
    return found


@cache
def is_openmpi(launcher: str) -> bool:
    """Whether an ``mpirun`` is Open MPI's (else MPICH's or a relative's)."""
    version = subprocess.run(
        [launcher, "--version"], capture_output=True, text=True, env=launch_environment()
    )
    return "Open MPI" in version.stdout


def _python_arguments(program: str | Path | Sequence[str]) -> list[str]:
    if isinstance(program, str):
        return ["-c", textwrap.dedent(program)]
    if isinstance(program, Path):
        return [str(program)]
    return list(program)


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
