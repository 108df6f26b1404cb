"""How a job ends: an error on one rank ends all of them, soon, and tells why once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.launch import Finished, find_mpirun, is_openmpi, launch_environment, mpirun
from support.launch import run as execute

RAISE = """
import sys, time
import numpy as np, mpizero
world = mpizero.init()
culprit = {culprit}
if world.rank == culprit % world.size:
    time.sleep(0.3)  # the others wait in the collective by now
    print("raised at", time.time(), flush=True)
    raise ValueError("the learning rate\\nis negative")
{waiting}
"""

WAITING = {
    "allreduce": "world.allreduce(np.ones(10))",
    "large": "world.allreduce(np.ones(1_000_000, np.float32), algorithm='ring')",
    "shared": "[world.allreduce(np.ones(99_999), algorithm='node_shared') for _ in range(9)]",
    "handle": "world.allreduce(np.ones(10), asynchronous=True).wait()",
    "nothing": "time.sleep(60)",
}


def run(n: int, program: str, **options: object) -> tuple[Finished, float]:
    result = mpirun(n, program, timeout=60, **options)  # type: ignore[arg-type]
    ended = time.time()
    raised = re.search(r"raised at ([\d.]+)", result.stdout)
    return result, ended - float(raised[1]) if raised else result.seconds


@pytest.mark.parametrize("waiting", WAITING)
@pytest.mark.parametrize("culprit", [0, -1])
def test_an_exception_on_one_rank_ends_the_job(culprit: int, waiting: str) -> None:
    result, seconds = run(3, RAISE.format(culprit=culprit, waiting=WAITING[waiting]))
    assert result.returncode != 0
    assert seconds < 5
    rank = culprit % 3
    lines = [line for line in result.stderr.splitlines() if line.startswith("[rank ")]
    assert all(line.startswith(f"[rank {rank}] ") for line in lines), lines
    assert result.stderr.count("Traceback (most recent call last)") == 1
    assert f"[rank {rank}] ValueError: the learning rate" in lines
    assert f"[rank {rank}] is negative" in lines


# What torch puts before our hook when a process group is made: it prefixes each line.
COLLECTING_HOOK = """
import io, sys, time
inner = sys.excepthook
def collect(*error):
    outer, sys.stderr = sys.stderr, io.StringIO()
    inner(*error)
    time.sleep(5)  # the launcher may be so quick
    outer.write(sys.stderr.getvalue())
sys.excepthook = collect
"""


def test_a_hook_that_collects_what_ours_prints_hides_nothing() -> None:
    program = "import mpizero\nw = mpizero.init()\n" + COLLECTING_HOOK
    program += "if w.rank == 1:\n    raise ValueError('of rank 1 alone')\nw.barrier()\n"
    result, _ = run(2, program)
    assert result.returncode != 0
    assert result.stderr.count("[rank 1] ValueError: of rank 1 alone") == 1, result.stderr


def test_an_error_that_all_ranks_raise_is_printed_once() -> None:
    program = "import numpy as np, mpizero\nw = mpizero.init()\nw.allreduce(np.ones(3 + w.rank))\n"
    result, _ = run(3, program)
    assert result.returncode != 0
    assert result.stderr.count("Traceback (most recent call last)") == 1
    assert "[rank 0]   rank 2: allreduce(float64, shape (5,)" in result.stderr


def test_an_error_that_each_rank_raises_by_itself_is_printed_once() -> None:
    """As a wrong argument is, whatever the number of the rank that says so."""
    program = (
        "import mpizero\nw = mpizero.init()\nraise ValueError(f'on rank {w.rank}: negative')\n"
    )
    result, _ = run(4, program)
    assert result.returncode != 0
    assert result.stderr.count("Traceback (most recent call last)") == 1, result.stderr


def test_a_normal_exit_stays_one() -> None:
    program = (
        "import sys, numpy as np, mpizero\nw = mpizero.init()\n"
        "w.allreduce(np.ones(3), asynchronous=True).wait()\nsys.exit({})\n"
    )
    for status in ("", "0"):
        result, _ = run(2, program.format(status))
        assert result.returncode == 0, result.stderr


def launcher_statuses(status: int) -> set[int]:
    """What ``mpirun`` may end with when a rank ends the job with ``status``.

    Open MPI's passes it on. MPICH's gives the status of the rank whose end it collects last, which
    is 9 for those that it kills.
    """
    return {status} if is_openmpi(find_mpirun(sys.executable)) else {status, 9}


def test_a_failing_exit_of_one_rank_ends_the_job_with_its_status() -> None:
    program = (
        "import sys, time, mpizero\nw = mpizero.init()\n"
        "if w.rank == 1:\n    print('raised at', time.time(), flush=True)\n    sys.exit(3)\n"
        "w.barrier()\n"
    )
    result, seconds = run(3, program)
    assert result.returncode in launcher_statuses(3) and seconds < 5
    assert "[rank 1] exited with status 3" in result.stderr


def test_a_killed_rank_inside_a_shared_collective_ends_the_job() -> None:
    program = (
        "import os, signal, time, numpy as np, mpizero\nw = mpizero.init()\n"
        "x = w.allocate(1 << 20, np.float32)\n"
        "for step in range(10**9):\n"
        "    if w.rank == 1 and step == 20:\n"
        "        print('raised at', time.time(), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    w.allreduce(x, algorithm='node_shared')\n"
    )
    result, seconds = run(3, program)
    assert result.returncode != 0 and seconds < 10


def test_the_singleton_trap_stops_the_job() -> None:
    environ = {**os.environ, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
    environ = {k: v for k, v in environ.items() if not k.startswith(("PMI", "MPIZERO"))}
    result = subprocess.run(
        [sys.executable, "-c", "import mpizero; mpizero.init()"],
        capture_output=True, text=True, env=environ, timeout=60,
    )  # fmt: skip
    assert result.returncode != 0
    assert "every rank would train alone" in result.stderr


def test_ranks_that_were_spawned_and_merged_work_together(tmp_path: Path) -> None:
    program = tmp_path / "spawns.py"
    program.write_text(
        "import sys\nfrom mpi4py import MPI\nimport numpy as np, mpizero\n"
        "parent = MPI.Comm.Get_parent()\n"
        "if parent == MPI.COMM_NULL:\n"
        "    parent = MPI.COMM_SELF.Spawn(sys.executable, [__file__], maxprocs=2)\n"
        "    merged = parent.Merge(False)\n"
        "else:\n    merged = parent.Merge(True)\n"
        "world = mpizero.init(merged)\n"
        "shared = world.allocate(4, 'float32')\nshared[:] = world.rank + 1\n"
        "for x in (np.ones(2), np.ones(1 << 20), shared):\n    world.allreduce(x)\n"
        "assert shared[0] == 6 and world.gather_objects(world.rank) == [0, 1, 2]\n"
        "if world.rank == 0:\n    print('sum', x[0], world.size)\n"
    )
    result = mpirun(1, program)
    assert result.stdout.strip() == "sum 6.0 3", result.stderr


def test_an_error_that_a_shell_shows_ends_nothing() -> None:
    """As in a cell of a notebook, or at a prompt; the last one is nobody's."""
    program = (
        "import code, os, sys, mpizero\nw = mpizero.init()\n"
        "shell = code.InteractiveInterpreter()\n"
        "if w.rank == 1:\n    shell.runsource('1 / 0')\n"
        "shell.runsource('import no_such_module')\n"
        "w.barrier()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    raise ValueError('of a child')\n"
        "assert os.waitpid(pid, 0)[1] != 0\n"
        "w.barrier()\nprint('all there')\nsys.stdout.flush()\n"
        "if w.rank == 1:\n    raise ValueError('the last one')\n"
        "w.barrier()\n"
    )
    result, _ = run(2, program)
    assert result.stdout.count("all there") == 2, result.stderr
    assert "[rank 1] ZeroDivisionError" in result.stderr
    assert result.stderr.count("ModuleNotFoundError") == 2
    assert result.returncode != 0 and "[rank 1] ValueError: the last one" in result.stderr


@pytest.mark.parametrize("size", [1, 2])
def test_forks_of_ranks_end_by_themselves(size: int) -> None:
    """With their own status, whatever is registered at exit, and no end of the job."""
    program = (
        "import atexit, os, sys, numpy as np, mpizero\nw = mpizero.init()\n"
        "shared = w.allocate(10, 'float32')\n"
        "def raises():\n    raise ValueError('of a child')\n"
        "def prints():\n    print('of a child')\n"
        "def ends():\n    atexit.register(prints)\n"
        "statuses = []\n"
        "for end in (raises, lambda: sys.exit(3), ends):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n        end()\n        sys.exit()\n"
        "    statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "w.barrier()\nprint(statuses)\n"
    )
    result, _ = run(size, program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("[1, 3, 0]") == result.stdout.count("of a child") == size
    assert "inalize" not in result.stderr, result.stderr  # MPI has nothing to say of its end


def test_torchrun_is_no_launcher_for_us() -> None:
    """Each of its processes would train alone, and save over the others' checkpoints."""
    program = (
        "import mpizero, mpizero_torch.horovod as hvd\n"
        "try:\n    mpizero.init()\n"
        "except mpizero.LaunchError as error:\n    print(error)\n"
        "hvd.init()\nprint('alone')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    for count in (1, 2):
        each = [f"--nproc-per-node={count}", sys.executable, "-c", program]
        result = execute([*command, *each], launch_environment(), 60)
        if count == 1:
            assert (result.returncode, result.stdout) == (0, "alone\n"), result.stderr
            continue
        assert result.returncode != 0 and "alone\n" not in result.stdout
        assert "LaunchError: torchrun" in result.stderr
        for text in (result.stdout, result.stderr):
            assert "mpirun -n 2 python train.py" in text


@pytest.mark.parametrize("size", [2, 4])
def test_torchs_variables_are_no_matter_under_mpirun(size: int) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
    result = mpirun(2, "import mpizero\nassert mpizero.init().size == 2\n", env=variables)
    assert result.returncode == 0, result.stderr


def test_a_child_process_of_a_rank_is_refused() -> None:
    program = (
        "import multiprocessing as mp, mpizero\n"
        "def child():\n"
        "    try:\n        mpizero.init()\n"
        "    except mpizero.LaunchError as error:\n        print('refused:', error, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    mpizero.init()\n"
        "    p = mp.get_context('fork').Process(target=child)\n"
        "    p.start(); p.join()\n"
    )
    result, _ = run(2, program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("refused: init() was called in a child process") == 2


def test_an_error_that_a_sub_world_raises_is_printed_once() -> None:
    program = (
        "import numpy as np, mpizero\nw = mpizero.init()\n"
        "part = w.split(0 if w.rank == 0 else 1)\n"  # ranks 1 and 2: 0 and 1 of their world
        "if w.rank > 0:\n    part.allreduce(np.ones(3 + w.rank))\nw.barrier()\n"
    )
    result, _ = run(3, program)
    assert result.returncode != 0
    assert result.stderr.count("Traceback (most recent call last)") == 1, result.stderr
    assert "[rank 1]   rank 1: allreduce(float64, shape (5,)" in result.stderr


def test_the_end_comes_whatever_was_closed_before() -> None:
    """Windows that ranks number differently: those of a world that rank 2 is not in come first."""
    program = (
        "import mpizero\nw = mpizero.init()\n"
        "first = w.split(0 if w.rank < 2 else None)\nsecond = w.split(0)\n"
        "if first is not None:\n    first.close()\n"
        "third = w.split(0)\nkept = third.allocate(9, 'float32')\nprint('done')\n"
    )
    result, _ = run(3, program)
    assert result.returncode == 0 and result.stdout.count("done") == 3


def test_a_program_may_end_mpi_itself() -> None:
    program = (
        "import mpizero\nfrom mpi4py import MPI\nw = mpizero.init()\n"
        "kept = w.allocate(9, 'float32')\nMPI.Finalize()\nprint('done')\n"
    )
    result, _ = run(2, program)
    assert result.returncode == 0 and result.stdout.count("done") == 2
    assert "Traceback" not in result.stderr


def test_an_error_that_the_reporting_rank_survives_is_printed() -> None:
    program = (
        "import numpy as np, mpizero\nw = mpizero.init()\n"
        "try:\n    w.allreduce(np.ones(3 + w.rank))\n"
        "except mpizero.MismatchError:\n    if w.rank == 1:\n        raise\n"
        "w.barrier()\n"
    )
    result, _ = run(3, program)
    assert result.returncode != 0
    assert "[rank 1]   rank 2: allreduce(float64, shape (5,)" in result.stderr


def test_an_exception_beside_a_thread_that_communicates_ends_the_job() -> None:
    program = RAISE.format(culprit=1, waiting=WAITING["handle"])
    result, seconds = run(3, program, env={"MPIZERO_PROGRESS": "thread"})
    assert result.returncode != 0 and seconds < 5
    assert "[rank 1] ValueError: the learning rate" in result.stderr


@pytest.mark.parametrize(
    ("leave", "status"),
    [
        ("exit(3)", 3),
        ("sys.exit('no data')", 1),
        ("raise SystemExit(3)", 3),
        ("raise type('Mine', (SystemExit,), {})(4)", 4),
        ("import argparse; argparse.ArgumentParser().error('no data')", 2),
    ],
)
def test_other_failing_exits_end_the_job_too(leave: str, status: int) -> None:
    program = (
        "import sys, time, mpizero\nw = mpizero.init()\n"
        f"if w.rank == 1:\n    print('raised at', time.time(), flush=True)\n    {leave}\n"
        "w.barrier()\n"
    )
    result = mpirun(3, program)
    assert result.returncode in launcher_statuses(status)
    assert ("no data" in result.stderr) == ("data" in leave)


@pytest.mark.parametrize(
    "survived",
    [
        "try:\n    sys.exit(2)\nexcept SystemExit as error:\n    assert error.code == 2\n",
        "t = threading.Thread(target=sys.exit, args=(2,))\nt.start()\nt.join()\n",
        "e = SystemExit(2)\nassert e.code == 2\ne.code = 3\nassert (e.code, e.args) == (3, (2,))\n"
        "try:\n    raise e\nexcept SystemExit:\n    pass\n",
        "import code\ntry:\n    code.InteractiveInterpreter().runsource('raise SystemExit(2)')\n"
        "except SystemExit as error:\n    print(error.code)\n",
    ],
    ids=["caught", "of a thread", "changed", "of a shell"],
)
def test_an_exit_that_the_program_survives_is_none(survived: str) -> None:
    program = f"import sys, threading, mpizero\nw = mpizero.init()\n{survived}w.barrier()\n"
    result, _ = run(2, program)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
