"""A Slurm of one node on this machine, for a test: munged, slurmctld and slurmd in a folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.launch import launch_environment, started

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str:
    """Why this machine cannot have one; "" if it can."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_SEARCH) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd takes root"
    if len(os.sched_getaffinity(0)) < 2:
        return "two cores are needed"
    return ""


@dataclass(frozen=True)
class Slurm:
    """A running one; its commands find it by ``environment``."""

    environment: dict[str, str]
    logs: Path

    def __call__(self, *command: str) -> str:
        """Run one of Slurm's commands, and return what it prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}{self.said()}")
        return done.stdout.strip()

    def said(self) -> str:
        """What the daemons have said last."""
        return "".join(
            f"\n--- {log.name}\n{log.read_text()[-2000:]}"
            for log in sorted(self.logs.glob("*.log"))
        )


@contextmanager
def slurm() -> Iterator[Slurm]:
    """Start one, and end it with its jobs."""
    # Not pytest's folder, whose name may be too long for a socket's.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, ExitStack() as daemons:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        for each in ("state", "spool"):
            (folder / each).mkdir()
        (folder / "slurm.conf").write_text(_configuration(folder))
        environment = {
            **launch_environment(), "PATH": _SEARCH, "SLURM_CONF": str(folder / "slurm.conf"),
        }  # fmt: skip
        found = Slurm(environment, folder)

        def start(*command: str) -> None:
            log = daemons.enter_context((folder / f"{command[0]}.log").open("w"))
            command = (shutil.which(command[0], path=_SEARCH) or command[0], *command[1:])
            daemons.enter_context(started(command, env=environment, stdout=log, stderr=log))

        files = [f"--{each}-file={folder}/munge.{each}" for each in ("pid", "log", "seed")]
        key, at = f"--key-file={folder}/key", f"--socket={folder}/munge.socket"
        start("munged", "--foreground", "--force", key, at, *files)
        wait_for(lambda: (folder / "munge.socket").exists(), "munged", found)
        start("slurmctld", "-D", "-c")
        start("slurmd", "-D", "-c")
        wait_for(lambda: "idle" in _answer(found, "sinfo", "-h", "-o", "%T"), "slurmd", found)
        try:
            yield found
        finally:
            _answer(found, "scancel", "--full", "--user=root")
            wait_for(lambda: not _answer(found, "squeue", "-h"), "the end of its jobs", found)


def wait_for(reached: Callable[[], object], what: str, cluster: Slurm, seconds: float = 60) -> None:
    """Until it is so; raises TimeoutError with the daemons' logs if it does not become so."""
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s{cluster.said()}")
        time.sleep(0.2)


def _answer(cluster: Slurm, *command: str) -> str:
    try:
        return cluster(*command)
    except RuntimeError:
        return ""


def _configuration(folder: Path) -> str:
    first, second = _free_ports(2)
    return _CONFIGURATION.format(
        folder=folder, host=socket.gethostname().partition(".")[0], cores=os.cpu_count(),
        controller_port=first, node_port=second,
    )  # fmt: skip


def _free_ports(count: int) -> Sequence[int]:
    with ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
