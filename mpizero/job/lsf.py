"""For LSF: ``bsub``, the MPI's own launcher; LSF warns by itself, and requeues by exit status."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from mpizero.job.body import head, launch, mebibytes, surroundings, text
from mpizero.job.job import Job
from mpizero.preemption import TRY_AGAIN


def script(job: Job) -> str:
    lines = head(job, "lsf", f"bsub < {job.file}", _directives(job))
    lines += surroundings(job)
    if job.signal:
        lines.append("trap : USR1 # LSF signals this shell, too: the ranks save, and it waits")
    lines.append(launch(job, job.mpi.launch(job.ranks, job.ranks_per_node, job.cpus_per_rank)))
    return text(lines)


def _directives(job: Job) -> Iterator[str]:
    minutes = ceil(job.seconds / 60)
    yield f"#BSUB -J {job.name}"
    if job.queue:
        yield f"#BSUB -q {job.queue}"
    if job.account:
        yield f"#BSUB -P {job.account}"
    yield f"#BSUB -n {job.ranks}"
    yield f'#BSUB -R "span[ptile={job.ranks_per_node}]"'
    yield f'#BSUB -R "affinity[core({job.cpus_per_rank})]"'
    if job.gpus_per_node:
        yield f'#BSUB -gpu "num={job.gpus_per_node}/host"'
    if job.memory:
        yield f'#BSUB -R "rusage[mem={mebibytes(job)}MB/host]"'
    yield f"#BSUB -W {minutes // 60:02}:{minutes % 60:02}"
    yield f"#BSUB -o {job.output or job.name + '-%J.out'}"
    if job.signal:
        yield f"#BSUB -wa USR1 -wt {ceil(job.signal / 60)}"
    if job.requeue:
        yield f"#BSUB -r -Q {TRY_AGAIN}"
