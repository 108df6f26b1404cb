"""Leaving in time: by signal or by the clock, at one step on all ranks, with the chosen status."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
import torch

import mpizero_torch as mz
from mpizero.world import time_left
from support.launch import launch_environment, mpirun, mpirun_command, started

PROGRAM = """
import os, signal, sys, time
import torch
import torch

import mpizero_torch as mz
world = mz.init()
model = mz.DistributedDataParallel(torch.nn.Linear(2, 2))
guard = mz.PreemptionGuard({arguments})
manager = mz.CheckpointManager({folder!r}, guard=guard, asynchronous={asynchronous}, model=model)
first = manager.restore_latest() or 0
print("from", first, flush=True)
for step in range(first, 1000):
    if {signalled} and step == first + 20 and world.rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.01)
    manager.step(step + 1)
print("not stopped", flush=True)
"""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_signal_to_one_rank_lets_all_save_and_go(tmp_path: Path, asynchronous: bool) -> None:
    program = PROGRAM.format(
        arguments="", folder=str(tmp_path), asynchronous=asynchronous, signalled=True
    )
    result = mpirun(2, program)
    assert result.returncode == 75, result.stderr
    assert "a rank has received SIGUSR1" in result.stderr
    assert "MPI_Abort" not in result.stderr and "not stopped" not in result.stdout
    assert [each.name for each in tmp_path.iterdir()] == ["step-00000021"]
    assert mpirun(2, program).stdout.count("from 21") == 2


def test_the_time_limit_lets_all_save_and_go(tmp_path: Path) -> None:
    program = PROGRAM.format(
        arguments="margin=60, time_left=61, exit_code=3", folder=str(tmp_path),
        asynchronous=False, signalled=False,
    )  # fmt: skip
    result = mpirun(2, program)
    assert result.returncode == 3, result.stderr
    assert "the job's time is nearly over" in result.stderr
    assert len(list(tmp_path.iterdir())) == 1


def test_a_signal_to_the_launcher_reaches_the_ranks(tmp_path: Path) -> None:
    """SIGUSR1: both launchers pass it on (SIGTERM Open MPI's does not; it kills)."""
    program = PROGRAM.format(
        arguments="", folder=str(tmp_path), asynchronous=False, signalled=False
    )
    command = [*mpirun_command(sys.executable, 2), sys.executable, "-c", program]
    with (tmp_path.parent / "out").open("w+") as out:
        with started(command, env=launch_environment(), stdout=out, stderr=out) as process:
            for _ in range(600):
                time.sleep(0.05)
                out.seek(0)
                if out.read().count("from 0") == 2:
                    break
            process.send_signal(signal.SIGUSR1)
            status = process.wait(60)
        out.seek(0)
        assert status == 75, out.read()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.once
def test_signals_go_back_to_who_had_them() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with mz.PreemptionGuard([signal.SIGUSR2]) as guard:
        assert not guard.should_stop()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert guard.should_stop() and guard.should_stop()
    assert signal.getsignal(signal.SIGUSR2) == before
    for wrong in ({"signals": [signal.SIGKILL]}, {"margin": -1}, {"exit_code": 256}):
        with pytest.raises(mz.ArgumentError, match=next(iter(wrong))):
            mz.PreemptionGuard(**wrong)  # type: ignore[arg-type]


@pytest.mark.once
def test_another_runs_later_checkpoints_are_not_mixed_in(tmp_path: Path) -> None:
    model = mz.DistributedDataParallel(torch.nn.Linear(2, 2))
    mz.CheckpointManager(tmp_path, model=model).save(9, best=0.5)
    again = mz.CheckpointManager(tmp_path, model=model)
    with pytest.raises(mz.ArgumentError, match="has a checkpoint of step 9"):
        again.save(3)
    assert again.restore_latest() == 9 and again.extra == {"best": 0.5, "step": 9}
    again.save(10)
    assert again.steps() == [9, 10]


DURATIONS = {
    "59": 59, "10:30": 630, "1:00:00": 3600, "2-03:04:05": 183845, "1-2": 93600,
    "UNLIMITED": None, "NOT_SET": None, "": None, "a:b": None,
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("text", DURATIONS)
def test_durations_as_schedulers_write_them(text: str) -> None:
    assert time_left._duration(text) == DURATIONS[text]


def stand_in(folder: Path, name: str, says: str) -> None:
    """A command of a scheduler that prints what it would."""
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.once
def test_schedulers_tell_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert time_left.seconds_left({}) is None
    end = str(int(time.time()) + 500)
    found = time_left.seconds_left({"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": end})
    assert found == pytest.approx(500, abs=30)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    stand_in(tmp_path, "squeue", "      1:30")
    assert time_left.seconds_left({"SLURM_JOB_ID": "1"}) == 90
    begun = time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(time.time() - 100))
    for says, expected in (
        (f"Job Id: 7\n    Resource_List.walltime = 00:10:00\n    stime = {begun}", 500),
        ("    Resource_List.walltime = 00:10:00\n    resources_used.walltime = 00:01:00", 540),
        ("    Walltime.Remaining = 77\n    Resource_List.walltime = 00:10:00", 77),
        ("    Resource_List.ncpus = 4", None),
    ):
        stand_in(tmp_path, "qstat", says)
        assert time_left.seconds_left({"PBS_JOBID": "7"}) == (
            None if expected is None else pytest.approx(expected, abs=30)
        )
    (tmp_path / "qstat").write_text("#!/bin/sh\nexit 1\n")
    assert time_left.seconds_left({"PBS_JOBID": "7"}) is None
