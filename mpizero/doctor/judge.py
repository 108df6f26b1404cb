"""From facts to findings: launcher, MPI, processes and hosts. Asks nothing, changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from mpizero.doctor import machine
from mpizero.doctor.facts import Facts, RankFacts
from mpizero.doctor.findings import Finding, Verdict, look, ok, wrong
from mpizero.doctor.host import ranges
from mpizero.world.launcher import Launch, singleton_mistake, singleton_remedy
from mpizero.world.nodes import NODES, RANKS_PER_NODE

REBUILD = 'MPICC="mpicc -shared" pip install --force-reinstall --no-binary=mpi4py mpi4py'

# Clocks further apart than this make logs, file times and time limits misleading.
_CLOCK_SECONDS = 1.0

# What must not differ between hosts, and what had better not.
_SAME, _LIKEWISE = ("mpizero", "mpi4py", "libmpi"), ("numpy", "torch", "cupy", "ml_dtypes")


def judge(facts: Facts) -> list[Finding]:
    """A finding for each topic that the facts allow to judge, in the order of the report."""
    judges: list[Callable[[Facts], Iterable[Finding]]] = [_launcher, _library, _wheels, _containers]
    judges.append(_processes)
    if facts.mpi.started and not facts.mpi.error and not _trap(facts):
        judges += [_hosts, _versions, _clocks, _thread_level]
    judges += machine.JUDGES
    return [finding for each in judges for finding in each(facts)]


def worst(findings: Iterable[Finding]) -> Verdict:
    """The verdict on the whole: that of the worst finding."""
    order: tuple[Verdict, ...] = ("ok", "look", "wrong")
    return max((finding.verdict for finding in findings), key=order.index, default="ok")


def _launcher(facts: Facts) -> Iterator[Finding]:
    launcher = facts.launcher
    if launcher.name:
        count = "" if launcher.size is None else f", which says {launcher.size} process(es)"
        yield ok("launcher", launcher.name + count)
    elif not launcher.found:
        yield look(
            "launcher",
            "none started this process, and none was found (mpirun, mpiexec, srun, jsrun)",
            "Load your site's MPI module (module avail mpi), or pip install 'mpizero[mpich]'.",
        )
    else:
        names = ", ".join(f"{name} ({path})" for name, path in launcher.found.items())
        best = "srun -n 8" if "mpirun" not in launcher.found else "mpirun -n 8"
        yield look(
            "launcher",
            f"none: only one process was seen; found here: {names}",
            f"`{best} mpizero doctor` looks at ranks, binding and network too.",
        )


def _library(facts: Facts) -> Iterator[Finding]:
    mpi = facts.mpi
    if not mpi.loaded:
        yield wrong(
            "MPI library",
            f"none can be loaded: {_one_line(mpi.error)}",
            f"Load your site's MPI module and build mpi4py against it: {REBUILD}; "
            "or take the embedded one: pip install 'mpizero[mpich]'.",
        )
        return
    where = mpi.path or "linked into mpi4py"
    launcher = facts.launcher
    other = _kind(launcher.mpirun_says) if launcher.alone else ""
    if mpi.trial:
        yield look(
            "MPI library",
            f"{mpi.library} ({where}) does not start without a launcher: {_one_line(mpi.trial)}",
            "Usual on some login nodes: run `srun -n 2 mpizero doctor` on compute nodes. If it "
            "fails there too, the MPI's installation is broken.",
        )
    elif mpi.error and not _trap(facts):
        yield wrong(
            "MPI library", f"{mpi.library}: {_one_line(mpi.error)}", _of_settings(mpi.error)
        )
    elif other and other != _kind(mpi.library):
        path = launcher.found.get("mpirun") or launcher.found.get("mpiexec")
        yield wrong(
            "MPI library",
            f"{mpi.library} ({where}), but {path} is of another: {launcher.mpirun_says}",
            f"Use the mpirun of the MPI that is loaded, or rebuild mpi4py for the other: {REBUILD}",
        )
    else:
        yield ok("MPI library", f"{mpi.library} ({where})")
    yield ok("mpi4py", f"{mpi.mpi4py}; to rebuild it for a site's MPI: {REBUILD}")


def _wheels(facts: Facts) -> Iterator[Finding]:
    wheels = facts.mpi.wheels
    if len(wheels) > 1:
        names = [wheel.split()[0] for wheel in wheels]
        yield wrong(
            "MPI wheels",
            f"{' and '.join(wheels)} in one environment: libraries of one and mpirun of the other",
            f"pip uninstall -y {' '.join(names)}; pip install {names[0]}  (one of them)",
        )
    else:
        yield ok("MPI wheels", wheels[0] if wheels else "none: the MPI is the machine's own")


def _containers(facts: Facts) -> Iterator[Finding]:
    kinds = {rank.container for rank in facts.ranks}
    if kinds == {""}:
        return
    name = next(kind for kind in sorted(kinds, reverse=True) if kind)
    if len(kinds) > 1:
        listed = ", ".join(kind or "none" for kind in sorted(kinds))
        yield look(
            "container", f"not the same for all ranks: {listed}",
            "Let the launcher start each rank in the same image.",
        )  # fmt: skip
    elif facts.launcher.alone:
        yield ok(
            "container", f"{name}; for several ranks let the host's launcher start it, with an MPI "
            "in it that understands that one (packaging/README.md)",
        )  # fmt: skip
    else:
        yield ok("container", f"{name}, and the launcher reaches into it")


def _processes(facts: Facts) -> Iterator[Finding]:
    launcher, mpi = facts.launcher, facts.mpi
    if trap := _trap(facts):
        if facts.ranks[0].variables.get("MPIZERO_ALLOW_SINGLETON") == "1":
            yield look(
                "processes", f"{trap} MPIZERO_ALLOW_SINGLETON=1 allows it.",
                "Unset MPIZERO_ALLOW_SINGLETON unless each rank is to train alone.",
            )  # fmt: skip
        else:
            yield wrong("processes", trap, singleton_remedy(_launch(facts)))
    elif not mpi.started:
        yield look(
            "processes",
            "MPI was not started: what follows is of this process alone",
            "Set right what stands above first.",
        )
    elif mpi.size == 1 and not launcher.name:
        yield ok("processes", "1: without mpirun (srun, ...) only one process was seen")
    else:
        yield ok("processes", f"{mpi.size}, which see each other")


def _trap(facts: Facts) -> str:
    """What ``init`` refuses: the launcher started several processes, and MPI sees one."""
    if not facts.launcher.name or not facts.mpi.started or facts.mpi.size > 1:
        return ""
    return singleton_mistake(_launch(facts))


def _launch(facts: Facts) -> Launch:
    return Launch(facts.launcher.name, facts.launcher.rank, facts.launcher.size, None)


def _hosts(facts: Facts) -> Iterator[Finding]:
    variables = facts.ranks[0].variables
    hosts = {host: len(ranks) for host, ranks in facts.hosts.items()}
    counts = set(hosts.values())
    text = f"{len(hosts)}, {next(iter(counts))} rank(s) each: {_some(list(hosts))}"
    if len(counts) > 1:
        each = [f"{host}: {count}" for host, count in hosts.items()]
        yield look(
            "hosts", f"{len(hosts)} with different numbers of ranks: {_some(each)}",
            "Ask for the same number on each (mpirun --map-by ppr:N:node, mpiexec -ppn N, "
            "srun --ntasks-per-node=N): collectives are fastest then.",
        )  # fmt: skip
    elif pretended := [name for name in (RANKS_PER_NODE, NODES) if variables.get(name)]:
        name = pretended[0]
        yield look(
            "hosts", f"{text}; taken for {facts.mpi.nodes} nodes: {name}={variables[name]}",
            f"Unset {name} except to try out what several nodes do.",
        )  # fmt: skip
    elif facts.mpi.nodes != len(hosts):
        yield look(
            "hosts", f"{text}; MPI sees {facts.mpi.nodes} groups of ranks that share memory",
            "Ranks in containers of their own share nothing: start one container per host, or "
            "give them a common /dev/shm and a common process namespace (--ipc=host --pid=host).",
        )  # fmt: skip
    else:
        yield ok("hosts", text)


def _versions(facts: Facts) -> Iterator[Finding]:
    first = facts.ranks[0].versions
    listed = ", ".join(
        f"{name} {v}" for name, v in first.items() if name not in ("libmpi", "mpi4py")
    )
    yield ok("versions", listed)
    severe = [*_differences(facts.ranks, _SAME), *_differences(facts.ranks, ("python",), _minor)]
    slight = [*_differences(facts.ranks, _LIKEWISE), *_differences(facts.ranks, ("python",))]
    remedy = (
        "Give all hosts one environment: a shared file system, one container image, or the same "
        "`module load` and PATH in the job script."
    )
    if severe:
        yield wrong("same everywhere", f"no: {'; '.join(severe)}", remedy)
    elif slight:
        yield look("same everywhere", f"no: {'; '.join(slight)}", remedy)
    elif len(facts.hosts) > 1:
        yield ok("same everywhere", f"on {len(facts.hosts)} hosts the same versions")


def _differences(
    ranks: Iterable[RankFacts], names: Iterable[str], of: Callable[[str], str] = str
) -> Iterator[str]:
    """``libmpi A on host1, libmpi B on host2`` for each of ``names`` that has several versions."""
    for name in names:
        where: dict[str, dict[str, None]] = {}
        for rank in ranks:
            where.setdefault(of(rank.versions.get(name, "missing")), {})[rank.host] = None
        if len(where) > 1:
            parts = (f"{name} {version} on {_some(list(on))}" for version, on in where.items())
            yield ", ".join(parts)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _clocks(facts: Facts) -> Iterator[Finding]:
    first = facts.ranks[0]
    if len(facts.hosts) < 2 or not first.clocks:
        return
    # A rank may leave a barrier late, when it has no core just then: its best time counts.
    apart = {
        rank.host: min(abs(a - b) for a, b in zip(rank.clocks, first.clocks, strict=True))
        for rank in facts.ranks
    }
    host = max(apart, key=lambda each: apart[each])
    text = f"at most {apart[host]:.2g} s apart"
    if apart[host] > _CLOCK_SECONDS:
        yield look(
            "clocks", f"{text}: {first.host} and {host}",
            "Logs, file times and the job's time limit are misleading there: tell the operators "
            "to look at NTP (chronyc tracking).",
        )  # fmt: skip
    else:
        yield ok("clocks", text)


def _thread_level(facts: Facts) -> Iterator[Finding]:
    level = facts.mpi.thread_level
    if level == "multiple":
        yield ok("thread level", level)
        return
    wish = facts.ranks[0].variables.get("MPIZERO_THREAD_LEVEL")
    yield look(
        "thread level",
        f"{level}: communication cannot overlap compute on a thread of its own",
        "Unset MPIZERO_THREAD_LEVEL, which asks for it."
        if wish and wish.lower() != "multiple"
        else "The MPI grants no more: use a build with MPI_THREAD_MULTIPLE, or leave it; training "
        "is right, only slower.",
    )


def _of_settings(error: str) -> str:
    if name := re.search(r"MPIZERO_\w+", error):
        return f"Set {name[0]} to what is allowed, or unset it."
    return f"See the message; if launcher and MPI do not match, rebuild mpi4py: {REBUILD}"


def _kind(text: str) -> str:
    """Which family of MPIs a library or an mpirun says that it is of; "" if none of the common."""
    if re.search(r"open ?mpi|OpenRTE|prte", text, re.IGNORECASE):
        return "Open MPI"
    return "MPICH" if re.search(r"mpich|hydra|intel|mvapich", text, re.IGNORECASE) else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _some(names: list[str], most: int = 8) -> str:
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")


def ranks_of(facts: Facts) -> list[str]:
    """A line for each rank: where it runs."""
    lines = []
    for rank in facts.ranks:
        numa = f", NUMA node {ranges(rank.numa)}" if rank.numa else ""
        gpu = f", {rank.gpu.name} at {rank.gpu.address}" if rank.gpu else ""
        lines.append(f"rank {rank.rank} on {rank.host}: cores {ranges(rank.cores)}{numa}{gpu}")
    return lines
