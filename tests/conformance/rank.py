"""What each rank of a launch runs: the tests' bodies, one after another, in its own process.

    mpirun -n 3 python -m conformance.rank FOLDER

FOLDER/job.json says which; the ranks leave FOLDER/<test>.<rank>.json for each test, and agree by
these files, which need no backend, on going to the next. After a test that failed, or did not end
in time, nobody knows what is left of it: the launch ends there.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import textwrap
import threading
import time
import traceback
import unittest
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from conformance.outcomes import FAILED, PASSED, SKIPPED, Outcome
from conformance.suite import Suite
from conformance.tables import TABLES
from mpizero.world.launcher import read_launch

_POLL_SECONDS = 0.005
_LONGEST_REASON = 160
# A rank that has failed gives the others this long: they may be waiting for it for ever.
_GRACE_SECONDS = 15.0
_LAST_RESORT_SECONDS = 60.0


class Rank:
    """One rank of a launch, and its part of the folder."""

    def __init__(self, folder: Path, rank: int) -> None:
        job = json.loads((folder / "job.json").read_text())
        self._folder, self._rank = folder, rank
        self._backend, self._ranks = job["backend"], job["ranks"]
        self._limit, self._tests = job["limit"], job["tests"]
        self._suite = Suite(self._backend, self._ranks, TABLES[job["table"]])

    def run(self) -> None:
        """Run all tests, or as far as they go."""
        for number, name in enumerate(self._tests):
            with (self._folder / f"{number}.{self._rank}.stack").open("w") as stack:
                # All ranks say where they hang; the launch is ended from outside, or by the alarm.
                # By a thread of Python's: faulthandler's own would read frames that change.
                show = partial(faulthandler.dump_traceback, stack)
                timer = threading.Timer(self._limit, show)
                timer.daemon = True
                timer.start()
                signal.alarm(int(self._limit + _LAST_RESORT_SECONDS))
                own = self._outcome(number, name)
                self._tell(number, own)
                fine = self._hear(number, own)
                timer.cancel()
                signal.alarm(0)
            if not fine:
                return

    def _outcome(self, number: int, name: str) -> Outcome:
        start = time.monotonic()
        why = self._suite.why_skipped(name)
        outcome = Outcome(SKIPPED, why) if why is not None else self._run(number, name)
        return Outcome(outcome.verdict, outcome.reason, time.monotonic() - start, outcome.details)

    def _run(self, number: int, name: str) -> Outcome:
        try:
            self._suite.prepare(self._folder / f"{number}.files")
            self._start_group(number, name)
            self._suite.wait_for_all(self._ranks, self._limit)
            self._suite.seed()
            with self._suite.changed():
                skipped = self._call(self._suite.case(name, self._rank), name)
            self._suite.wait_for_all(self._ranks, self._limit)
            if dist.is_initialized():
                dist.destroy_process_group()
        except BaseException as error:
            return Outcome(FAILED, _in_one_line(error), details=traceback.format_exc())
        return Outcome(PASSED) if skipped is None else Outcome(SKIPPED, skipped)

    def _call(self, case: Any, name: str) -> str | None:
        """Run a test's body; the reason if it skips itself."""
        try:
            getattr(case, name)()
        except unittest.SkipTest as skip:
            return str(skip)
        except SystemExit as left:
            why = self._suite.meaning_of_exit(left.code)
            if why is None:
                raise
            return why
        return None

    def _start_group(self, number: int, name: str) -> None:
        timeout = timedelta(seconds=self._suite.seconds_for_group(name))
        if self._backend == "mpizero":
            dist.init_process_group(self._backend, timeout=timeout)
            return
        store = self._folder / f"{number}.store"
        dist.init_process_group(self._backend, f"file://{store}", timeout, self._ranks, self._rank)

    def _tell(self, number: int, outcome: Outcome) -> None:
        place = self._folder / f"{number}.{self._rank}.json"
        draft = place.with_suffix(".draft")
        draft.write_text(json.dumps(outcome.as_dict()))
        draft.rename(place)

    def _hear(self, number: int, own: Outcome) -> bool:
        """Wait for all; have none of them failed?"""
        deadline = time.monotonic() + _GRACE_SECONDS if own.verdict == FAILED else None
        verdicts = set()
        for rank in range(self._ranks):
            place = self._folder / f"{number}.{rank}.json"
            while not place.exists():
                if deadline is not None and time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_SECONDS)
            verdicts.add(json.loads(place.read_text())["verdict"])
        return len(verdicts) == 1 and FAILED not in verdicts


def _in_one_line(error: BaseException) -> str:
    words = traceback.format_exception_only(error)[-1].split()
    return textwrap.shorten(" ".join(words), _LONGEST_REASON)


def main() -> None:
    """Run a job's tests on this rank."""
    launch = read_launch(os.environ)
    if launch is None:
        raise SystemExit("conformance.rank is for mpirun to start; see tests/conformance/run.py")
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    if job["backend"] == "mpizero":
        import mpizero_torch.distributed  # noqa: F401 (registers the backend)
    rank = Rank(folder, launch.rank)
    rank.run()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without tidying up: after a failure others may never come to do so together.
    os._exit(0)


if __name__ == "__main__":
    main()
