"""How long the scheduler will let this job run on: Slurm and PBS know."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence

_ANSWER_SECONDS = 20.0


def seconds_left(environ: Mapping[str, str] | None = None) -> float | None:
    """Seconds until the job's time limit; None without a scheduler, a limit, or an answer.

    Slurm tells the end in SLURM_JOB_END_TIME (from 22.05 on), or by ``squeue``; PBS by ``qstat``.
    """
    environ = os.environ if environ is None else environ
    if end := environ.get("SLURM_JOB_END_TIME", ""):
        return float(end) - time.time() if end.isdecimal() else None
    if job := environ.get("SLURM_JOB_ID"):
        return _duration(_answer(["squeue", "--noheader", "--jobs", job, "--format", "%L"]))
    if job := environ.get("PBS_JOBID"):
        return _of_qstat(_answer(["qstat", "-f", job]))
    return None


def _answer(command: Sequence[str]) -> str:
    """What a command prints; nothing if there is none, or if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _of_qstat(text: str) -> float | None:
    """From the attributes of a job: Torque says what remains, PBS Professional when it began."""
    found = dict(re.findall(r"^\s*([\w.]+) = (.*)$", text, re.MULTILINE))
    if found.get("Walltime.Remaining", "").isdecimal():
        return float(found["Walltime.Remaining"])
    limit = _duration(found.get("Resource_List.walltime", ""))
    if limit is None:
        return None
    try:
        begun = time.mktime(time.strptime(found.get("stime", ""), "%a %b %d %H:%M:%S %Y"))
    except ValueError:
        used = _duration(found.get("resources_used.walltime", ""))
        return None if used is None else limit - used
    return limit - (time.time() - begun)


def _duration(text: str) -> float | None:
    """Seconds of "days-hours:minutes:seconds", from whose left parts may be missing."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+)", text.strip())
    if found is None:  # UNLIMITED, NOT_SET, ...
        return None
    days, *clock = found.groups()
    given = [int(part) for part in clock if part is not None]
    if days is not None:  # "2-3": what follows the days begins with hours
        given += [0] * (3 - len(given))
    seconds = 0
    for part in given:
        seconds = seconds * 60 + part
    return float(seconds + int(days or 0) * 86400)
