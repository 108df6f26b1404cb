"""From facts to findings: cores, threads, memory, GPUs, network, times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from mpizero.doctor.facts import Facts, RankFacts
from mpizero.doctor.findings import Finding, look, ok, wrong
from mpizero.doctor.host import ranges

_MB, _GB = 1e6, 1e9

# Docker gives containers 64 MB. MPI itself takes some tens of them, gradient buckets what the
# model's gradients take.
_SHM_WRONG, _SHM_LOOK = 128 << 20, 1 << 30

# What even a laptop does better than.
_SLOW_SECONDS, _SLOW_BYTES = 2e-3, 0.1 * _GB

_BIND = (
    "Bind each rank to cores of its own: Open MPI --map-by slot:PE={per} --bind-to core; MPICH and "
    "Intel MPI -bind-to core:{per} (I_MPI_PIN_DOMAIN={per}); srun --cpus-per-task={per} "
    "--cpu-bind=cores."
)


def _cores(facts: Facts) -> Iterator[Finding]:
    for host, ranks in facts.hosts.items():
        allowed = {core for rank in ranks for core in rank.cores}
        physical = {core for rank in ranks for core in rank.physical}
        has = f"{len(ranks)} rank(s) on {host}: {len(allowed)} of its {ranks[0].host_cores} cores"
        if len(ranks) > len(allowed):
            yield wrong(
                "cores", f"{has}, fewer than ranks",
                f"Start at most {len(allowed)} ranks there, or get more cores (srun "
                "--cpus-per-task, ncpus in PBS; with Open MPI see also --bind-to none).",
            )  # fmt: skip
        elif len(ranks) > len(physical) > 0:
            yield look(
                "cores", f"{has}, which are {len(physical)} with two hardware threads each",
                f"Start at most {len(physical)} ranks there: threads of one core share its units.",
            )  # fmt: skip
        else:
            yield ok("cores", has)


def _binding(facts: Facts) -> Iterator[Finding]:
    for host, ranks in facts.hosts.items():
        if len(ranks) == 1:
            yield ok("binding", f"rank {ranks[0].rank} on {host}: cores {ranges(ranks[0].cores)}")
            continue
        yield from _binding_on(host, ranks)


def _binding_on(host: str, ranks: list[RankFacts]) -> Iterator[Finding]:
    everything = {core for rank in ranks for core in rank.cores}
    remedy = _BIND.format(per=max(1, ranks[0].host_cores // len(ranks)))
    unbound = len(everything) == ranks[0].host_cores
    unbound = unbound and all(set(rank.cores) == everything for rank in ranks)
    groups = [group for group in _that_share(ranks) if len(group) > 1]
    crowded = [group for group in groups if len(group) > len(_union(group))]
    if crowded and not unbound:
        which = "; ".join(f"{_names(group)} on {_place(group)}" for group in crowded)
        yield wrong("binding", f"{host}: too many ranks on the same cores: {which}", remedy)
    elif unbound:
        yield look("binding", f"{host}: none, every rank may run on {_place(ranks)}", remedy)
    elif groups:
        which = "; ".join(f"{_names(group)} on {_place(group)}" for group in groups)
        yield look("binding", f"{host}: cores that overlap: {which}", remedy)
    else:
        yield ok("binding", f"{host}: {len(ranks)} ranks on cores of their own")


def _that_share(ranks: Iterable[RankFacts]) -> list[list[RankFacts]]:
    """Ranks in groups: those whose cores overlap, directly or through others, together."""
    groups: list[list[RankFacts]] = []
    for rank in ranks:
        touching = [group for group in groups if _union(group) & set(rank.cores)]
        groups = [group for group in groups if group not in touching]
        groups.append([*(each for group in touching for each in group), rank])
    return groups


def _union(ranks: Iterable[RankFacts]) -> set[int]:
    return {core for rank in ranks for core in rank.cores}


def _names(ranks: list[RankFacts]) -> str:
    return f"ranks {ranges(rank.rank for rank in ranks)}"


def _place(ranks: list[RankFacts]) -> str:
    cores = _union(ranks)
    return f"core{'s' if len(cores) > 1 else ''} {ranges(cores)}"


def _threads(facts: Facts) -> Iterator[Finding]:
    """torch's threads: OMP_NUM_THREADS; if it is unset, mz.init gives a rank its share of cores."""
    for host, ranks in facts.hosts.items():
        share = max(1, len(_union(ranks)) // len(ranks))
        given = [_given_threads(rank) for rank in ranks]
        rank, most = max(zip(ranks, given, strict=True), key=lambda pair: pair[1] or 0)
        remedy = f"export OMP_NUM_THREADS={share}, or unset it: mz.init() then gives {share}."
        name = f"{host}: OMP_NUM_THREADS={most}"
        together = sum(each or share for each in given)
        if most is None:
            yield ok("threads", f"{host}: OMP_NUM_THREADS is unset; mz.init() gives {share} a rank")
        elif most > len(rank.cores):
            yield wrong("threads", f"{name}, but rank {rank.rank} has {_count(rank)}", remedy)
        elif together > len(_union(ranks)) >= len(ranks):
            yield wrong(
                "threads", f"{name}: {together} threads of {len(ranks)} ranks on "
                f"{len(_union(ranks))} cores", remedy,
            )  # fmt: skip
        elif most * 4 <= share:
            yield look("threads", f"{name}, with {share} cores for each rank: most idle", remedy)
        else:
            yield ok("threads", name)


def _count(rank: RankFacts) -> str:
    return f"{len(rank.cores)} core{'s' if len(rank.cores) > 1 else ''}"


def _given_threads(rank: RankFacts) -> int | None:
    """OMP_NUM_THREADS may be a list, one number for each level of nesting."""
    first = rank.variables.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() else None


def _shared_memory(facts: Facts) -> Iterator[Finding]:
    remedy = (
        "docker run --shm-size=8g (podman the same; Kubernetes: an emptyDir of medium Memory at "
        "/dev/shm; Apptainer binds the host's), or `mount -o remount,size=50% /dev/shm`; and "
        "remove what dead jobs have left there."
    )
    for host, ranks in facts.hosts.items():
        size, free = ranks[0].shm_size, ranks[0].shm_free
        if size is None or free is None:
            yield look(
                "shared memory", f"{host}: no /dev/shm",
                "Ranks of a node then cannot be seen to have room to share: use Linux.",
            )  # fmt: skip
            continue
        text = f"{host}: /dev/shm of {_size(size)}, {_size(free)} free"
        if free < _SHM_WRONG:
            yield wrong("shared memory", f"{text}: gradients have no room to share", remedy)
        elif free < _SHM_LOOK:
            yield look("shared memory", f"{text}: a small model's gradients at most", remedy)
        else:
            yield ok("shared memory", text)


def _gpus(facts: Facts) -> Iterator[Finding]:
    for host, ranks in facts.hosts.items():
        count, bound = ranks[0].host_gpus, [rank for rank in ranks if rank.gpu is not None]
        if not count and not bound:
            yield ok("GPUs", f"{host}: no GPU")
        elif not bound:
            yield _unused_gpus(host, ranks)
        else:
            yield _bound_gpus(host, ranks, bound)


def _unused_gpus(host: str, ranks: list[RankFacts]) -> Finding:
    text = f"{host}: {ranks[0].host_gpus}, but no rank uses one"
    variables = ranks[0].variables
    if variables.get("MPIZERO_DEVICE") == "cpu":
        return ok("GPUs", f"{text}: MPIZERO_DEVICE=cpu says so")
    if not any("cupy" in rank.versions for rank in ranks):
        return wrong(
            "GPUs", f"{text}: CuPy is missing", "pip install 'mpizero[cuda12]' (or [cuda13])"
        )
    return wrong(
        "GPUs", f"{text}: CuPy {ranks[0].versions.get('cupy')} sees none",
        "Ask the scheduler for GPUs (--gpus-per-node, ngpus), see that CUDA_VISIBLE_DEVICES "
        f"({variables.get('CUDA_VISIBLE_DEVICES', 'unset')!r} here) is not empty, and try "
        "python -c 'import cupy; cupy.show_config()'.",
    )  # fmt: skip


def _bound_gpus(host: str, ranks: list[RankFacts], bound: list[RankFacts]) -> Finding:
    addresses = [rank.gpu.address for rank in bound if rank.gpu]
    name = bound[0].gpu.name if bound[0].gpu else ""
    text = f"{host}: {len(set(addresses))} {name} for {len(ranks)} ranks"
    far = [
        rank.rank
        for rank in bound
        if rank.gpu and rank.gpu.numa is not None and rank.numa and rank.gpu.numa not in rank.numa
    ]
    if len(bound) < len(ranks):
        return wrong(
            "GPUs", f"{text}: {len(ranks) - len(bound)} of them have none",
            "Give every rank the same environment and device (MPIZERO_DEVICE, CuPy).",
        )  # fmt: skip
    if len(set(addresses)) < len(addresses):
        return look(
            "GPUs", f"{text}: ranks share a GPU",
            f"Start {max(ranks[0].host_gpus, len(set(addresses)))} ranks on each host, and show "
            "each its own GPU or all of them (srun --gpus-per-task=1, or no --gpu-bind).",
        )  # fmt: skip
    if far:
        return look(
            "GPUs", f"{text}: ranks {ranges(far)} run far from theirs, on another NUMA node",
            "Bind ranks to the cores beside their GPU: srun --gpu-bind=closest, or a rank file.",
        )  # fmt: skip
    return ok("GPUs", text)


def _way_of_gpus(facts: Facts) -> Iterator[Finding]:
    """Which way the data of GPUs takes, and why."""
    mpi = facts.mpi
    if mpi.size == 1 or not any(rank.gpu for rank in facts.ranks):
        return
    topic, host = "data of GPUs", "by MPI" if mpi.cuda_aware else "through pinned host memory"
    if not mpi.nccl_reason:
        yield ok(topic, "from GPU to GPU by NCCL, enqueued on streams")
        return
    yield look(
        topic, f"{host}, waited for by the host; not by NCCL: {mpi.nccl_reason}",
        "NCCL comes with CuPy's and torch's CUDA wheels, and wants a GPU for each rank.",
    )  # fmt: skip


def _cuda_awareness(facts: Facts) -> Iterator[Finding]:
    topic, mpi, variables = "CUDA-aware MPI", facts.mpi, facts.ranks[0].variables
    gpus = any(rank.host_gpus or rank.gpu for rank in facts.ranks)
    cray = "cray" in mpi.library.lower()
    if gpus and cray and variables.get("MPICH_GPU_SUPPORT_ENABLED") != "1":
        yield wrong(
            topic, f"{mpi.library} without MPICH_GPU_SUPPORT_ENABLED=1 takes no GPU memory",
            "export MPICH_GPU_SUPPORT_ENABLED=1 in the job script, with the craype-accel module "
            "loaded, which links the GTL library that it needs.",
        )  # fmt: skip
    elif not any(rank.gpu for rank in facts.ranks):
        yield ok(topic, "no GPU in use: nothing was tried" if gpus else "no GPU: not needed")
    elif mpi.cuda_aware:
        yield ok(topic, f"yes: {mpi.cuda_reason}")
    elif variables.get("MPIZERO_CUDA_AWARE") == "0":
        yield look(
            topic, "switched off: arrays go through pinned host memory",
            "Unset MPIZERO_CUDA_AWARE, and a trial decides.",
        )  # fmt: skip
    elif mpi.built_for_cuda:
        yield look(
            topic, f"the library says that it is built for CUDA, but {mpi.cuda_reason}; arrays go "
            "through pinned host memory",
            "Open MPI: --mca pml ucx, UCX_TLS with cuda_copy,cuda_ipc (ucx_info -d lists them); "
            "MPICH: MPIR_CVAR_ENABLE_GPU=1; Intel MPI: I_MPI_OFFLOAD=1.",
        )  # fmt: skip
    else:
        yield look(
            topic, f"no: {mpi.cuda_reason}; arrays go through pinned host memory",
            "Load the site's CUDA-aware MPI and build mpi4py against it (see mpi4py above).",
        )  # fmt: skip


def _bfloat16(facts: Facts) -> Iterator[Finding]:
    versions = facts.ranks[0].versions
    torch = "torch's kernels after mz.init()" if "torch" in versions else "numpy's, no torch here"
    yield ok(
        "bfloat16",
        f"ml_dtypes {versions.get('ml_dtypes', '?')}; sums in float32; conversions: {torch}",
    )


def _network(facts: Facts) -> Iterator[Finding]:
    several = len(facts.hosts) > 1
    without = [host for host, ranks in facts.hosts.items() if not ranks[0].fast_network]
    first = facts.ranks[0]
    if not without:
        yield ok("network", f"{', '.join(first.fast_network)}; {', '.join(first.interfaces)}")
    elif several:
        yield look(
            "network", f"TCP only on {without[0]} ({', '.join(first.interfaces) or 'no interface'})"
            + (f" and {len(without) - 1} more" if len(without) > 1 else ""),
            "If the site has InfiniBand, Slingshot, Omni-Path or EFA, show its devices to the job "
            "(containers: /dev/infiniband) and use the site's MPI, which knows them; else choose "
            "the fastest interface (UCX_NET_DEVICES, btl_tcp_if_include, FI_TCP_IFACE).",
        )  # fmt: skip
    else:
        listed = ", ".join(first.interfaces) or "no interface"
        yield ok("network", f"{listed}; one host: ranks talk through memory")


def _times(facts: Facts) -> Iterator[Finding]:
    times = facts.timings
    if times is None:
        return
    yield ok("copy", f"{times.bytes / times.copy_seconds / _GB:.1f} GB/s a rank, all at once")
    if facts.mpi.size == 1:
        return
    share = 2 * (facts.mpi.size - 1) / facts.mpi.size  # what each rank must move, at the least
    speed = times.bytes * share / times.seconds
    text = (
        f"{times.small_bytes} B in {times.small_seconds * 1e6:.1f} us; {times.bytes / _MB:.0f} MB "
        f"in {times.seconds * 1e3:.1f} ms ({speed / _GB:.2f} GB/s a rank)"
    )
    if not times.correct:
        yield wrong(
            "all-reduce", f"{text}, but the sums are wrong",
            "Try algorithm=\"native\" (mpizero bench checks each), another MPI, or another fabric.",
        )  # fmt: skip
    elif times.small_seconds > _SLOW_SECONDS or speed < _SLOW_BYTES:
        yield look(
            "all-reduce", f"{text}: slow",
            "See cores, binding and network above; Open MPI with more ranks than cores: "
            "--mca mpi_yield_when_idle 1. `mpizero bench` has all sizes and algorithms.",
        )  # fmt: skip
    else:
        yield ok("all-reduce", text)


def _size(nbytes: int) -> str:
    return f"{nbytes / _GB:.1f} GB" if nbytes >= _GB else f"{nbytes / _MB:.0f} MB"


JUDGES: list[Callable[[Facts], Iterable[Finding]]] = [
    _cores, _binding, _threads, _shared_memory, _gpus, _way_of_gpus, _cuda_awareness, _bfloat16,
    _network, _times,
]  # fmt: skip
