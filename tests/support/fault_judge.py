"""Let one fault happen, and see how the job ends and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from support.faults import ENDS, GOES_ON, Fault
from support.launch import (
    ROOT,
    find_mpirun,
    is_openmpi,
    launch_environment,
    mpirun_command,
    started,
)

PROGRAM = Path(__file__).parent / "faulty_program.py"

TIMEOUT = 3.0  # MPIZERO_TIMEOUT of every job
_SECONDS = 50.0  # a job that has not ended so long after the fault hangs
_START_SECONDS = 120.0  # importing torch takes long where others do it, too
_VANISH_SECONDS = 3.0  # for processes to be gone after the launcher has said that all is over
_LATER = ", removed by the next start"
_WORD = "FAULT_JOB"  # in the environment of every process of the job


class NotHereError(Exception):
    """This machine does not let us make the fault: the message says what it lacks."""


@dataclass(frozen=True)
class Verdict:
    """How a job ended. ``wrong``: in what it was not as promised; "" if in nothing."""

    fault: str
    seconds: float  # from the fault to the end of the job, or of the program
    status: int
    said: str  # the line that tells the cause
    left: list[str]  # processes, files in /dev/shm, half-written checkpoints
    wrong: str


@cache
def mpi_name() -> str:
    """Of the MPI that belongs to this Python."""
    return "Open MPI" if is_openmpi(find_mpirun(sys.executable)) else "MPICH"


def judge(fault: Fault) -> Verdict:
    """Run a job to which this happens. Raises NotHereError where it cannot be made to happen."""
    with tempfile.TemporaryDirectory(prefix="mpizero-fault-") as name, ExitStack() as stack:
        folder = Path(name)
        machine = stack.enter_context(_machine(fault, folder))
        ended = _run(fault, folder, machine)
        again = None
        if fault.saves:
            again = _run(fault.without(), folder, machine)
        return _verdict(fault, ended, again, folder)


@dataclass(frozen=True)
class _Ended:
    status: int
    output: str
    seconds: float  # from the fault
    happened: bool
    done: set[int]  # ranks that came to the end of their program
    left: list[str]
    late: bool


@dataclass(frozen=True)
class _Machine:
    """What the job runs in: words in front of its command, and its /dev/shm as seen from here."""

    words: Sequence[str]
    root: Path
    before: frozenset[str]

    @property
    def shared(self) -> Path:
        return self.root / "dev" / "shm"

    def files(self) -> list[str]:
        """What has come into /dev/shm since, and belongs to no process."""
        new = {each.name for each in self.shared.iterdir()} - self.before
        if new and self.root == Path("/"):
            maps = [_text(path) for path in Path("/proc").glob("[0-9]*/maps")]
            new = {each for each in new if not any(each in text for text in maps)}
        return sorted(new)


def _run(fault: Fault, folder: Path, machine: _Machine) -> _Ended:
    word, log = secrets.token_hex(8), folder / f"log-{secrets.token_hex(2)}"
    config = {**fault.config, "log": str(log), "folder": str(folder / "disk" / "run")}
    python = [*fault.around, sys.executable, str(PROGRAM), json.dumps(config)]
    arguments = fault.launcher_arguments.get(mpi_name(), ())
    command = [*machine.words, *mpirun_command(sys.executable, fault.ranks, arguments), *python]
    if fault.alone:
        command = [*machine.words, *python]
    env = launch_environment(
        {
            _WORD: word, "MPIZERO_TIMEOUT": f"{TIMEOUT:g}", "TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'adapters'}:{ROOT / 'tests'}",
            "MPIZERO_PROGRESS": "thread" if fault.thread else "inline", **fault.env,
        }
    )  # fmt: skip
    output = folder / f"out-{log.name}"
    with output.open("w") as file, started(command, env=env, stdout=file, stderr=file) as process:
        late = not _ends(process, log)
        ended = time.time()
        processes = _processes(word)
        for pid, _ in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    lines = log.read_text().split("\n") if log.exists() else []
    times = [float(line.split()[1]) for line in lines if line.startswith("fault ")]
    left = [f"process {name}" for _, name in processes]
    left += [f"/dev/shm/{name}" for name in machine.files()]
    left += [each.name for each in (machine.root / str(folder)[1:] / "disk" / "run").glob("*.*")]
    done = {int(line.split()[1]) for line in lines if line.startswith("done ")}
    begun = min(times, default=ended)
    if fault.promise == GOES_ON:
        ended = min(_steps_after(lines, begun), default=ended)
    return _Ended(
        process.returncode, output.read_text(errors="replace"), ended - begun, bool(times),
        done, left, late,
    )  # fmt: skip


def _ends(process: subprocess.Popen[str], log: Path) -> bool:
    """Wait for it; False if it hangs."""
    begun = time.time()
    while time.time() - begun < _START_SECONDS:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            return True
        happened = [line for line in _text(log).splitlines() if line.startswith("fault ")]
        if happened:
            begun = min(begun, float(happened[0].split()[1]) + _SECONDS - _START_SECONDS)
    return False


def _verdict(fault: Fault, ended: _Ended, again: _Ended | None, folder: Path) -> Verdict:
    wrong, left = [], list(ended.left)
    said = ""
    output = ended.output.replace("exited on\nsignal", "exited on signal")
    output = output.replace(str(folder), "FOLDER").replace(f"{ROOT}/", "")
    for pattern in fault.says:
        found = re.search(rf"^.*(?:{pattern}).*$", output, re.MULTILINE)
        if found is None:
            wrong.append(f"does not say {pattern!r}")
        else:
            said = said or found[0].strip()
    if fault.promise == ENDS and not fault.says:  # what the launcher says, each in its own way
        said = next((line.strip() for line in output.splitlines() if line.strip()), "")
    if not ended.happened and not fault.alone:
        wrong.append("nothing had happened")
    if ended.late:
        wrong.append(f"has not ended after {_SECONDS:g} s")
    elif fault.promise == ENDS:
        if ended.status == 0:
            wrong.append("ended with status 0")
        if ended.seconds > fault.limit:
            wrong.append(f"took {ended.seconds:.1f} s")
    else:
        if ended.status != 0:
            wrong.append(f"ended with status {ended.status}")
        missing = set(range(fault.ranks)) - set(fault.config["ranks"] if fault.dies else ())
        if not missing <= ended.done:
            wrong.append(f"only {sorted(ended.done)} came to the end")
    if again is not None:
        if again.status or len(again.done) < fault.ranks:
            wrong.append(f"started again, ended with {again.status}: {again.output[-2000:]}")
        left = [
            f"{each}, removed by the next start" if ".partial" in each else each for each in left
        ]
        wrong += [f"started again, left {each}" for each in again.left]
    wrong += [f"left {each}" for each in left if not each.endswith(_LATER)]
    text = "; ".join(wrong)
    if text:
        text += f"\n--- what it printed\n{ended.output[-6000:]}"
    return Verdict(fault.name, round(ended.seconds, 1), ended.status, said, left, text)


@contextmanager
def _machine(fault: Fault, folder: Path) -> Iterator[_Machine]:
    """A /dev/shm of its own where that is possible, and the limits that the fault is about."""
    (folder / "disk" / "run").mkdir(parents=True)
    (folder / "tmp").mkdir()
    with ExitStack() as stack:
        words: list[str] = []
        root = Path("/")
        mounts = [f"mount -t tmpfs -o size={fault.shared or '50%'} tmpfs /dev/shm"]
        if fault.disk:
            mounts.append(f"mount -t tmpfs -o size={fault.disk} tmpfs {folder / 'disk'}")
            mounts.append(f"mkdir {folder / 'disk' / 'run'}")
        keeper = _keep_mounts(mounts)
        if keeper is not None:
            stack.callback(_end, keeper)
            words += ["nsenter", "-t", str(keeper.pid), "-m", f"--wd={os.getcwd()}", "--"]
            root = Path(f"/proc/{keeper.pid}/root")
        elif fault.disk or fault.shared:
            raise NotHereError("needs to mount file systems (root, or a user namespace)")
        if fault.memory:
            group = stack.enter_context(_memory_group(fault.memory))
            words += ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
        yield _Machine(words, root, frozenset(os.listdir(root / "dev" / "shm")))


def _keep_mounts(mounts: Sequence[str]) -> subprocess.Popen[str] | None:
    """A process that sleeps in a mount namespace of its own; None where that is not allowed."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return None
    script = " && ".join([*mounts, "echo ready", "exec sleep 1000"])
    keeper = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert keeper.stdout is not None
    if keeper.stdout.readline().strip() == "ready":
        return keeper
    _end(keeper)
    return None


@contextmanager
def _memory_group(nbytes: int) -> Iterator[Path]:
    """A control group whose processes have so much memory together; of either version."""
    for parent, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = parent / f"mpizero-fault-{secrets.token_hex(4)}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(nbytes))
            with suppress(OSError):
                (group / "memory.swap.max").write_text("0")
            yield group
            return
        except OSError:
            continue
        finally:
            _remove_group(group)
    raise NotHereError("needs to make a control group that limits memory (root)")


def _remove_group(group: Path) -> None:
    for _ in range(50):
        try:
            group.rmdir()
            return
        except OSError:  # its last process is on its way out
            time.sleep(0.1)


def _processes(word: str) -> list[tuple[int, str]]:
    """Of the job, after a while in which they may end: their numbers and names."""
    deadline = time.monotonic() + _VANISH_SECONDS
    while True:
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            if f"{_WORD}={word}" in _text(environ):
                name = _text(environ.parent / "comm").strip()
                if name:
                    found.append((int(environ.parent.name), name))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _steps_after(lines: Sequence[str], begun: float) -> Iterator[float]:
    """When the steps ended that the fault was in, or a later one."""
    at = next((int(line.split()[2]) for line in lines if line.startswith("fault ")), 0)
    for line in lines:
        if line.startswith("step "):
            _, moment, step = line.split()
            if int(step) >= at and float(moment) > begun:
                yield float(moment)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has ended, or is another user's
        return ""


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
