"""Launches of the ranks, as many as it takes until every test has its outcome."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conformance.outcomes import FAILED, Outcome, together
from conformance.tables import BACKEND, Table
from support.launch import ROOT, launch_environment, mpirun_command, started

# Beside the tests' own limits: for starting Python and torch, on a machine that is busy.
_START_SECONDS = 240.0
_POLL_SECONDS = 0.2
_STACK_SECONDS = 2.0  # one rank has run out of time: the others are about to
_LINES_OF_STACK = 40
_END_OF_OUTPUT = 4000  # characters

# As torch's own CI does; and what is skipped because it asks for more is run on more.
RANKS, MORE_RANKS = 3, 4
_ASKS_FOR_MORE = f"world size of {MORE_RANKS}"

Report = Callable[[str, Outcome], None]


@dataclass(frozen=True)
class Setting:
    """What the tests are run with. ``limit``: seconds that a test may take."""

    python: str
    backend: str
    limit: float
    ranks: int = RANKS
    table: Table = BACKEND


class LaunchFailedError(Exception):
    """A launch came to an end before its first test."""


def run_tests(setting: Setting, tests: Sequence[str], report: Report) -> dict[str, Outcome]:
    """Run the tests, in order, each within its time; ``report`` hears of each as it ends."""
    outcomes = _run_on(setting, tests, report)
    more = [name for name in tests if _ASKS_FOR_MORE in outcomes[name].reason]
    return outcomes | _run_on(replace(setting, ranks=MORE_RANKS), more, report)


def _run_on(setting: Setting, tests: Sequence[str], report: Report) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    while left := [name for name in tests if name not in outcomes]:
        with tempfile.TemporaryDirectory(prefix="mpizero-conformance-") as folder:
            outcomes |= _Launch(setting, left, Path(folder), report).run()
    return outcomes


class _Launch:
    """One launch: it comes to at least one test, and ends with the first that fails."""

    def __init__(
        self, setting: Setting, tests: Sequence[str], folder: Path, report: Report
    ) -> None:
        self._setting, self._tests, self._folder, self._report = setting, tests, folder, report
        self._outcomes: dict[str, Outcome] = {}

    def run(self) -> dict[str, Outcome]:
        setting, folder = self._setting, self._folder
        job: dict[str, Any] = {"backend": setting.backend, "ranks": setting.ranks}
        job.update(limit=setting.limit, tests=list(self._tests), table=setting.table.name)
        (folder / "job.json").write_text(json.dumps(job))
        command = mpirun_command(setting.python, setting.ranks)
        command += [setting.python, "-m", "conformance.rank", str(folder)]
        # The suite of torch's that this process has imported has left its own word of the ranks.
        environment = launch_environment({"WORLD_SIZE": None})
        environment["PYTHONPATH"] = f"{ROOT / 'tests'}:{environment['PYTHONPATH']}"
        environment["PYTORCH_PRINT_REPRO_ON_FAILURE"] = "0"  # it is not run by torch's command
        with (folder / "output").open("w") as output:
            streams: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT}
            with started(command, env=environment, **streams) as process:
                status = self._watch(process)
        self._take_finished()
        number = len(self._outcomes)
        if number < len(self._tests) and list(folder.glob(f"{number}.*.stack")):
            self._add([self._left_by(rank, status) for rank in range(setting.ranks)])
        if not self._outcomes:
            raise LaunchFailedError(f"{status}, before its first test\n{self._output()}")
        return self._outcomes

    def _watch(self, process: subprocess.Popen[str]) -> str:
        """Wait for the end of the ranks, and take what they tell; how they ended, in words."""
        since = time.monotonic()
        while process.poll() is None:
            if self._take_finished():
                since = time.monotonic()
            elif self._is_out_of_time():
                time.sleep(_STACK_SECONDS)
                return "the launch was ended, as the time was up"
            elif time.monotonic() - since > _START_SECONDS + self._setting.limit:
                return "the launch was killed, as nothing came of it any more"
            time.sleep(_POLL_SECONDS)
        return f"the launch ended with status {process.returncode}"

    def _is_out_of_time(self) -> bool:
        """Has a rank written down where it is stuck?"""
        stacks = self._folder.glob(f"{len(self._outcomes)}.*.stack")
        return any(stack.stat().st_size for stack in stacks)

    def _take_finished(self) -> int:
        """Take the outcomes of the tests that all ranks have told of; how many these are."""
        before = len(self._outcomes)
        while (number := len(self._outcomes)) < len(self._tests):
            places = [self._told(number, rank) for rank in range(self._setting.ranks)]
            if not all(place.exists() for place in places):
                break
            self._add([Outcome(**json.loads(place.read_text())) for place in places])
        return len(self._outcomes) - before

    def _add(self, of_ranks: Sequence[Outcome]) -> None:
        name, outcome = self._tests[len(self._outcomes)], together(of_ranks)
        self._outcomes[name] = outcome
        self._report(name, outcome)

    def _left_by(self, rank: int, status: str) -> Outcome:
        """The outcome of a test that the launch did not survive, from what a rank has left."""
        number, limit = len(self._outcomes), self._setting.limit
        if (place := self._told(number, rank)).exists():
            return Outcome(**json.loads(place.read_text()))
        stack = place.with_suffix(".stack")
        if stack.exists() and (where := stack.read_text()):
            short = "\n".join(where.splitlines()[:_LINES_OF_STACK])
            return Outcome(FAILED, f"not done in {limit:.0f} s", limit, short)
        return Outcome(FAILED, f"did not end: {status}", 0.0, self._output(), is_guess=True)

    def _told(self, number: int, rank: int) -> Path:
        return self._folder / f"{number}.{rank}.json"

    def _output(self) -> str:
        return (self._folder / "output").read_text(errors="replace")[-_END_OF_OUTPUT:]
