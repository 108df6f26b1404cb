"""What the scripts of all schedulers have in common: from the modules to the launch."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from mpizero.job.job import MEBIBYTE, Job
from mpizero.preemption import TRY_AGAIN

_WIDTH = 90


def head(job: Job, scheduler: str, submit: str, directives: Iterable[str]) -> list[str]:
    """The first lines, up to the last directive."""
    return [
        "#!/bin/bash",
        f"# {job.ranks} ranks on {job.nodes} node(s), {job.mpi.name}; from `mpizero job "
        f"{scheduler}`. Submit with: {submit}",
        *directives,
        "",
    ]


def surroundings(job: Job, more: Iterable[str] = ()) -> list[str]:
    """Modules, the user's own lines, and variables; ``more``: further exports, as lines."""
    variables = {**job.mpi.variables, **(job.mpi.on_gpus if job.gpus_per_node else {})}
    lines = [f"module load {module}" for module in job.modules]
    lines += job.before
    lines += [f"export OMP_NUM_THREADS={job.cpus_per_rank}", *more]
    for name, value in {**variables, **job.variables}.items():
        lines.append(f"export {name}={shlex.quote(value)}")
    return [*lines, ""]


def launch(job: Job, launcher: Sequence[str]) -> str:
    """The launcher's line; the command on one of its own where both would be too long."""
    line, command = shlex.join(launcher), shlex.join(job.command)
    between = " " if len(line) + len(command) < _WIDTH else " \\\n    "
    return f"{line}{between}{command}"


def again(how: str) -> list[str]:
    """Start again what has saved and left (``mpizero.PreemptionGuard``), by the command ``how``."""
    return [
        "status=$?",
        f'if [ "$status" -eq {TRY_AGAIN} ]; then # saved, and not done',
        f"    exec {how}",
        "fi",
        'exit "$status"',
    ]


def mebibytes(job: Job) -> int:
    """The memory of a node."""
    return int((job.memory or 0) // MEBIBYTE)


def text(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"
