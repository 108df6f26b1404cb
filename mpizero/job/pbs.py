"""For PBS Professional and OpenPBS: ``qsub``, the MPI's own launcher, and ``qsub`` again.

PBS warns nobody of the time limit, and lets no user requeue a running job: coreutils' ``timeout``
sends the launcher the signal, which it passes on, and the job submits its script again.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpizero.job.body import again, head, launch, mebibytes, surroundings, text
from mpizero.job.job import Job


def script(job: Job) -> str:
    lines = head(job, "pbs", f"qsub {job.file}", _directives(job))
    lines += ['cd "$PBS_O_WORKDIR" || exit 1', *surroundings(job)]
    launcher = job.mpi.launch(job.ranks, job.ranks_per_node, job.cpus_per_rank)
    if job.signal:
        lines.append(f"# {job.signal} s before the end the launcher gets it, and passes it on.")
        options = ["--foreground", "--preserve-status", "--signal=USR1"]
        launcher = ["timeout", *options, str(job.seconds - job.signal), *launcher]
    lines.append(launch(job, launcher))
    if job.requeue:
        lines += again(f"qsub {job.file}")
    return text(lines)


def _directives(job: Job) -> Iterator[str]:
    cores = job.ranks_per_node * job.cpus_per_rank
    node = f"ncpus={cores}:mpiprocs={job.ranks_per_node}:ompthreads={job.cpus_per_rank}"
    if job.gpus_per_node:
        node += f":ngpus={job.gpus_per_node}"
    if job.memory:
        node += f":mem={mebibytes(job)}mb"
    yield f"#PBS -N {job.name}"
    if job.queue:
        yield f"#PBS -q {job.queue}"
    if job.account:
        yield f"#PBS -A {job.account}"
    yield f"#PBS -l select={job.nodes}:{node}"
    yield "#PBS -l place=scatter"
    yield f"#PBS -l walltime={job.clock}"
    yield "#PBS -j oe"
    if job.output:
        yield f"#PBS -o {job.output}"
    # Of a job that PBS itself has stopped, for another one or with a node.
    yield f"#PBS -r {'y' if job.requeue else 'n'}"
