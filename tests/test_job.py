"""Job scripts: what ``mpizero job`` prints runs in Slurm, and with stand-ins for PBS and LSF."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mpizero.cli import main
from mpizero.job import MPIS, SCHEDULERS, seconds_of
from mpizero.job.mpis import mpi_of
from support.launch import ROOT, find_mpirun, is_openmpi, launch_environment, started
from support.slurm import slurm, wait_for, why_no_slurm

JOB = ["--nodes", "4", "--ranks-per-node", "8", "--time", "4:00:00"]
HERE = "openmpi" if is_openmpi(find_mpirun(sys.executable)) else "mpich"

# By these options the scripts of examples/jobs are printed.
TRAIN = ["python", "examples/train_gpt.py", "--strategy", "zero2"]
TRAIN += ["--checkpoint-dir", "run-train", "--checkpoint-every", "500", "--resume"]
EXAMPLES = {
    name: [name, *JOB, "--cpus-per-rank", "8", "--mpi", mpi, "--script", f"examples/jobs/{name}.sh"]
    for name, mpi in (("slurm", "openmpi"), ("pbs", "mpich"), ("lsf", "openmpi"))
}


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["job", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.once
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_the_command_prints(name: str) -> None:
    file = ROOT / "examples" / "jobs" / f"{name}.sh"
    assert file.read_text() == printed(*EXAMPLES[name], "--", *TRAIN)
    assert {each.stem for each in file.parent.iterdir()} == set(EXAMPLES)


FULL = [
    *("--gpus-per-node", "4", "--mem", "480GiB", "--queue", "long", "--account", "project-7"),
    *("--module", "cuda/12.4", "--module", "site-mpi", "--before", "conda activate train"),
    *("--env", 'GREETING=it\'s "$HOME"', "--output", "logs/%j.txt", "--signal", "300"),
]


@pytest.mark.once
@pytest.mark.parametrize("mpi", MPIS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_script_is_sound_shell(scheduler: str, mpi: str) -> None:
    for options in ([], FULL, ["--no-requeue", "--signal", "0"]):
        text = printed(scheduler, *JOB, "--mpi", mpi, *options, "--", "python", "a b.py", "$x")
        assert text.startswith("#!/bin/bash\n") and text.endswith("\n")
        assert "'a b.py' '$x'" in text
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr
        if shutil.which("shellcheck"):
            # SC2016: the command is not meant to be expanded.
            checker = ["shellcheck", "--exclude=SC2016", "-"]
            done = subprocess.run(checker, input=text, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


@pytest.mark.once
def test_what_is_asked_for_is_said_in_each_schedulers_words() -> None:
    options = [*JOB, *FULL, "--cpus-per-rank", "6", "--mpi", "cray"]
    said = {name: printed(name, *options, "--", "./train") for name in SCHEDULERS}
    for name, words in {
        "slurm": [
            *("--nodes=4", "--ntasks-per-node=8", "--cpus-per-task=6", "--gpus-per-node=4"),
            *("--mem=491520M", "--time=04:00:00", "--partition=long", "--account=project-7"),
            *("--signal=USR1@300", "--requeue", "--output=logs/%j.txt"),
            *("SRUN_CPUS_PER_TASK=6", "srun --mpi=cray_shasta --cpu-bind=cores ./train"),
        ],
        "pbs": [
            "select=4:ncpus=48:mpiprocs=8:ompthreads=6:ngpus=4:mem=491520mb",
            *("walltime=04:00:00", "-q long", "-A project-7", "-o logs/%j.txt", "-r y"),
            "--signal=USR1 14100 mpiexec -n 32 --ppn 8 --depth 6 --cpu-bind depth",
        ],
        "lsf": [
            *("-n 32", "span[ptile=8]", "affinity[core(6)]", "num=4/host", "mem=491520MB/host"),
            *("-W 04:00", "-q long", "-P project-7", "-wa USR1 -wt 5", "-r -Q 75"),
        ],
    }.items():
        for word in [*words, "OMP_NUM_THREADS=6", "MPICH_GPU_SUPPORT_ENABLED=1", "cuda/12.4"]:
            assert word in said[name], (word, said[name])
        lines = said[name].splitlines()
        assert lines.index("module load site-mpi") < lines.index("conda activate train")
        value = next(line for line in lines if line.startswith("export GREETING="))
        shown = subprocess.run(
            ["bash", "-c", f'{value}; printf %s "$GREETING"'], capture_output=True, text=True
        )
        assert shown.stdout == 'it\'s "$HOME"'


@pytest.mark.once
def test_gpu_awareness_of_each_mpi() -> None:
    for mpi, variable in {
        "openmpi": "OMPI_MCA_opal_cuda_support=true", "mpich": "MPIR_CVAR_ENABLE_GPU=1",
        "intel": "I_MPI_OFFLOAD=1", "cray": "MPICH_GPU_SUPPORT_ENABLED=1",
        "mvapich": "MV2_USE_CUDA=1",
    }.items():  # fmt: skip
        for scheduler in SCHEDULERS:
            on_gpus = printed(scheduler, *JOB, "--mpi", mpi, "--gpus-per-node", "8", "--", "x")
            assert f"export {variable}\n" in on_gpus
            assert variable not in printed(scheduler, *JOB, "--mpi", mpi, "--", "x")


def test_the_mpi_is_the_one_that_is_loaded() -> None:
    assert f", {HERE};" in printed("slurm", *JOB, "--", "x")
    for library, name in {
        "Open MPI v5.0.8, package: ...": "openmpi",
        "MPICH Version:      4.3.0": "mpich",
        "MPI VERSION    : CRAY MPICH version 8.1.28.15 (ANL base 3.4a2)": "cray",
        "Intel(R) MPI Library 2021.12 for Linux* OS": "intel",
        "MVAPICH2 Version      :\t2.3.7": "mvapich",
    }.items():
        found = mpi_of(library)
        assert found is not None and found.name == name
    assert mpi_of("another") is None


@pytest.mark.once
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--nodes", "0"], "'nodes' is 0; allowed: a number >= 1"),
        (["--ranks-per-node", "-1"], "'ranks-per-node' is -1"),
        (["--cpus-per-rank", "0"], "'cpus-per-rank' is 0"),
        (["--gpus-per-node", "-2"], "'gpus-per-node' is -2"),
        (["--time", "240"], "'time' is '240'; allowed: hours:minutes:seconds"),
        (["--time", "0:00:30"], "'time' is 30 s"),
        (["--signal", "14400"], "'signal' is 14400 s; allowed: 0 (none) to less than"),
        (["--mem", "1"], None),
        (["--mem", "1B"], "'mem' is 1 bytes"),
        (["--name", "my job"], "'name' is 'my job'"),
        (["--queue", "a;b"], "'queue' is 'a;b'"),
        (["--account", "--x"], "'account' is '--x'"),
        (["--module", "a && b"], "'module' is 'a && b'"),
        (["--output", "a b"], "'output' is 'a b'"),
        (["--env", "1A=2"], "'env' is '1A'; allowed: NAME=VALUE"),
        (["--env", "A"], "'A' is not NAME=VALUE"),
        (["--mpi", "other"], "'other' is not one of"),
    ],
)
def test_bad_input_is_refused(changed: list[str], said: str | None) -> None:
    result = CliRunner().invoke(main, ["job", "slurm", *JOB, *changed, "--", "x"])
    assert (result.exit_code == 0) == (said is None), result.output
    assert said is None or said in result.output
    assert "command" in CliRunner().invoke(main, ["job", "slurm", *JOB]).output


@pytest.mark.once
def test_durations() -> None:
    assert [seconds_of(each) for each in ("4:00:00", "1-12:00:01", "100:00:00")] == [
        14400, 129601, 360000,
    ]  # fmt: skip


def stand_in(folder: Path, name: str, program: str) -> None:
    """A command of a scheduler."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{program}\n")
    path.chmod(0o755)


# Trains until it is told to leave; the second time for a moment only.
PROGRAM = """
import os, time
import numpy as np
import mpizero
from mpizero import checkpoint

world = mpizero.init()
guard = mpizero.PreemptionGuard(margin=0)
first, weights = 0, np.zeros(4)
if os.path.exists({folder!r}):
    found = checkpoint.load({folder!r}, world)
    first, weights = found["step"], found["weights"].gather()["w"]
cores = len(os.sched_getaffinity(0))
print("from", first, "on", cores, "threads", os.environ["OMP_NUM_THREADS"], flush=True)
for step in range(first, first + 10 if first else 100000):
    time.sleep(0.01)
    weights += world.allreduce(np.ones(4), "mean")
    if guard.should_stop():
        state = mpizero.ShardedState.scatter({{"w": weights}}, world)
        checkpoint.save({folder!r}, {{"weights": state, "step": step + 1}}, world)
        guard.exit()
assert (weights == step + 1).all()
print("done with", step + 1, flush=True)
"""


def job_of(scheduler: str, folder: Path, *options: str) -> Path:
    """A script that trains on two ranks of this machine."""
    program = folder / "train.py"
    program.write_text(PROGRAM.format(folder=str(folder / "saved")))
    where = ["--nodes", "1", "--ranks-per-node", "2", "--time", "0:01:00"]
    script = folder / "train.sh"
    command = [sys.executable, str(program)]
    script.write_text(printed(scheduler, *where, *options, "--", *command))
    return script


def environment_with(stand_ins: Path, **variables: str) -> dict[str, str]:
    beside = Path(sys.executable).parent
    path = f"{stand_ins}:{beside}:{os.environ['PATH']}"
    return {**launch_environment(), "PATH": path, **variables}


needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="binds two ranks to a core each"
)


@needs_two_cores
def test_a_pbs_job_leaves_before_its_end_and_submits_itself(tmp_path: Path) -> None:
    """qsub is a stand-in; the launcher, and the signal that it passes on, are real."""
    script = job_of("pbs", tmp_path, "--signal", "48")
    stand_in(tmp_path, "qsub", "echo submitted: $*")
    environment = environment_with(tmp_path, PBS_O_WORKDIR=str(tmp_path))

    def run() -> Any:
        return subprocess.run(
            ["bash", str(script)], env=environment, capture_output=True, text=True, timeout=60
        )

    first, again = run(), run()
    assert first.returncode == 0 and "received SIGUSR1" in first.stderr, first.stderr
    assert first.stdout.count("from 0 on 1 threads 1") == 2, first.stdout
    assert "submitted: train.sh" in first.stdout
    assert again.returncode == 0 and "submitted" not in again.stdout, again.stderr
    assert again.stdout.count("done with") == 2 and "from 0 " not in again.stdout


@needs_two_cores
def test_an_lsf_job_leaves_with_the_status_that_requeues_it(tmp_path: Path) -> None:
    """LSF signals all processes of the job on the first host; here this test does."""
    script = job_of("lsf", tmp_path, "--signal", "30")
    environment = environment_with(tmp_path)
    with (
        (tmp_path / "out").open("w+") as out,
        started(["bash", str(script)], env=environment, stdout=out, stderr=out) as process,
    ):
        end = time.monotonic() + 60
        while (tmp_path / "out").read_text().count("from 0") < 2:
            assert time.monotonic() < end, (tmp_path / "out").read_text()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGUSR1)
        for launcher in _children(process.pid):
            os.kill(launcher, signal.SIGUSR1)
        status = process.wait(60)
    said = (tmp_path / "out").read_text()
    assert status == 75 and "received SIGUSR1" in said, said
    assert "-Q 75" in script.read_text()


def _children(parent: int) -> list[int]:
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(each) for each in path.read_text().split()]


@pytest.mark.once
@pytest.mark.parametrize("status", [0, 75, 1])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_start_again_what_has_left(name: str, status: int, tmp_path: Path) -> None:
    """With stand-ins for what starts programs and for the schedulers' commands."""
    for launcher in ("srun", "mpiexec", "mpirun"):
        stand_in(tmp_path, launcher, f"echo started\nexit {status}")
    for command in ("scontrol", "qsub"):
        stand_in(tmp_path, command, f"echo again: {command} $*")
    environment = environment_with(tmp_path, SLURM_JOB_ID="12", PBS_O_WORKDIR=str(tmp_path))
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "jobs" / f"{name}.sh")],
        env=environment, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert "started" in done.stdout, done.stderr
    again = re.search("again: (scontrol requeue 12|qsub .*/pbs.sh)$", done.stdout, re.MULTILINE)
    if name == "lsf":  # which sees the status, and starts the job again by itself
        assert again is None and done.returncode == status
    else:
        assert bool(again) == (status == 75), done.stdout
        assert done.returncode == (0 if status == 75 else status)


@pytest.mark.timeout(300)
@pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm())
def test_slurm_signals_requeues_and_resumes_the_job(tmp_path: Path) -> None:
    """A real one: srun starts the ranks, its clock sends the signal, and scontrol requeues."""
    log = tmp_path / "out"
    # From the time limit of a minute: at the first look that Slurm takes after ten seconds.
    script = job_of("slurm", tmp_path, "--signal", "50", "--output", str(log))

    def said() -> str:
        return log.read_text() if log.exists() else ""

    with slurm() as cluster:
        try:
            cluster("srun", f"--mpi={MPIS[HERE].srun}", "true")
        except RuntimeError as error:
            if "can not load PMIx" not in str(error):
                raise
            pytest.skip("Slurm has no PMIx for Open MPI: apt-get install libpmix-dev")
        job = cluster("sbatch", "--parsable", str(script))

        def shows(word: str) -> bool:
            return word in cluster("scontrol", "show", "job", job)

        wait_for(lambda: shows("Restarts=1"), f"requeueing; {said()}", cluster, 120)
        first = said()
        assert first.count("from 0 on 1 threads 1") == 2, first
        assert "a rank has received SIGUSR1: saving, and leaving" in first
        # Slurm keeps a requeued job back for two minutes. It needs one second: a node refuses what
        # is started in the second in which it was killed there.
        time.sleep(2)
        cluster("scontrol", "update", f"JobId={job}", "StartTime=now")
        wait_for(lambda: shows("JobState=COMPLETED"), f"the second run; {said()}", cluster, 120)
    resumed = re.findall(r"from (\d+) on 1 threads 1", said())[2:]
    assert len(resumed) == 2 and resumed[0] == resumed[1] != "0", said()
    assert said().count(f"done with {int(resumed[0]) + 10}") == 2, said()
