"""For Slurm: ``sbatch``, ``srun``, and ``scontrol requeue`` under the same job number."""

from __future__ import annotations

from collections.abc import Iterator

from mpizero.job.body import again, head, launch, mebibytes, surroundings, text
from mpizero.job.job import Job


def script(job: Job) -> str:
    lines = head(job, "slurm", f"sbatch {job.file}", _directives(job))
    # From Slurm 22.05 on srun does not take the number of cores over from the allocation.
    lines += surroundings(job, [f"export SRUN_CPUS_PER_TASK={job.cpus_per_rank}"])
    lines.append(launch(job, ["srun", f"--mpi={job.mpi.srun}", "--cpu-bind=cores"]))
    if job.requeue:
        lines += again('scontrol requeue "$SLURM_JOB_ID"')
    return text(lines)


def _directives(job: Job) -> Iterator[str]:
    options = {
        "job-name": job.name,
        "partition": job.queue,
        "account": job.account,
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "cpus-per-task": job.cpus_per_rank,
        "gpus-per-node": job.gpus_per_node,
        "mem": f"{mebibytes(job)}M" if job.memory else "",
        "time": job.clock,
        "output": job.output or "%x-%j.out",
        "open-mode": "append",
    }
    for name, value in options.items():
        if value:
            yield f"#SBATCH --{name}={value}"
    yield "#SBATCH --requeue" if job.requeue else "#SBATCH --no-requeue"
    if job.signal:
        yield "# At least so many seconds before the end every rank gets it, to save and leave."
        yield f"#SBATCH --signal=USR1@{job.signal}"
