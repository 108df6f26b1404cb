"""Launches of the ranks, as many as it takes until every test has its outcome."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.outcomes import FAILED, Outcome, together
from support.launch import ROOT, launch_environment, mpirun_command, started

# Beside the tests' own limits: for starting Python and torch, on a machine that is busy.
_START_SECONDS = 240.0
_POLL_SECONDS = 0.2
_LINES_OF_STACK = 30

Report = Callable[[str, Outcome], None]


@dataclass(frozen=True)
class Setting:
    """What the tests are run with. ``limit``: seconds that a test may take."""

    python: str
    backend: str
    ranks: int
    limit: float


class LaunchFailedError(Exception):
    """A launch came to an end before its first test."""


def run_tests(setting: Setting, tests: Sequence[str], report: Report) -> dict[str, Outcome]:
    """Run the tests, in order; ``report`` hears of each as its launch has ended."""
    outcomes: dict[str, Outcome] = {}
    left = list(tests)
    while left:
        for name, outcome in _launch(setting, left).items():
            outcomes[name] = outcome
            report(name, outcome)
        left = [name for name in left if name not in outcomes]
    return outcomes


def _launch(setting: Setting, tests: Sequence[str]) -> dict[str, Outcome]:
    """One launch: the outcomes of the tests that it came to, at least one."""
    with tempfile.TemporaryDirectory(prefix="mpizero-conformance-") as name:
        folder = Path(name)
        job: dict[str, Any] = {"backend": setting.backend, "ranks": setting.ranks}
        job.update(limit=setting.limit, tests=list(tests))
        (folder / "job.json").write_text(json.dumps(job))
        status = _run_launch(setting, folder)
        return _collect(setting, folder, tests, status)


def _run_launch(setting: Setting, folder: Path) -> str:
    """Run a launch to its end; how it ended, in words."""
    program = [setting.python, "-m", "conformance.rank", str(folder)]
    command = [*mpirun_command(setting.python, setting.ranks), *program]
    environment = launch_environment()
    environment["PYTHONPATH"] = f"{ROOT / 'tests'}:{environment['PYTHONPATH']}"
    with (folder / "output").open("w") as output:
        options = {"env": environment, "stdout": output, "stderr": subprocess.STDOUT}
        with started(command, **options) as process:
            seen, since = -1, time.monotonic()
            while process.poll() is None:
                now, count = time.monotonic(), len(list(folder.glob("*.json")))
                if count != seen:
                    seen, since = count, now
                elif now - since > _START_SECONDS + setting.limit:
                    return "killed, as nothing came of it any more"
                time.sleep(_POLL_SECONDS)
            return f"the launch ended with status {process.returncode}"


def _collect(
    setting: Setting, folder: Path, tests: Sequence[str], status: str
) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for number, name in enumerate(tests):
        if not list(folder.glob(f"{number}.*.stack")):
            break
        found = [_outcome_of(folder, number, rank, setting, status) for rank in range(setting.ranks)]
        outcomes[name] = together(found)
    if not outcomes:
        said = (folder / "output").read_text(errors="replace")
        raise LaunchFailedError(f"{status}, before its first test\n{said[-4000:]}")
    return outcomes


def _outcome_of(
    folder: Path, number: int, rank: int, setting: Setting, status: str
) -> Outcome:
    place = folder / f"{number}.{rank}.json"
    if place.exists():
        return Outcome(**json.loads(place.read_text()))
    stack = folder / f"{number}.{rank}.stack"
    where = stack.read_text() if stack.exists() else ""
    if where:
        short = "\n".join(where.splitlines()[:_LINES_OF_STACK])
        return Outcome(FAILED, f"not done in {setting.limit:.0f} s", setting.limit, short)
    said = (folder / "output").read_text(errors="replace")[-4000:]
    return Outcome(FAILED, f"did not end: {status}", details=said)
