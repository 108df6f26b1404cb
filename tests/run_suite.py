"""Run the tests with each given Python, alone and under its ``mpirun`` on several ranks.

    python tests/run_suite.py [--ranks 1,2,3,4] [--workers 2] [--timeout 3000] PYTHON...
                              [-- pytest's arguments]

One launch per Python and rank count, so that importing torch is paid once for all tests of a
launch. On one rank, plain ``python`` runs the serial tests and those marked for one rank, by files
on several workers, since many of them wait for a job that they have started. For the same reason
these launches run beside those of several ranks, each sort one after the other. Tests that are
marked ``alone`` follow when nothing else runs. All launches are run, whatever the earlier ones
said; a table at the end tells how each ended. Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

from support.launch import (
    RANK_COUNTS,
    ROOT,
    end,
    find_mpirun,
    is_openmpi,
    launch_environment,
    mpirun_command,
    started,
)

_ENDING = 60  # lines kept of each launch
_NO_TESTS = 5  # pytest's status when the selection is empty
_CLOSING_LINE = re.compile(
    r"=* ?(.*\b(passed|failed|deselected|errors?|ran)\b.* in [\d.]+s.*?)[ =]*"
)
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


@dataclass(frozen=True)
class Launch:
    """The tests of one rank count, with one MPI."""

    python: str
    ranks: int
    workers: int = 1
    with_once: bool = True
    alone: bool = False

    @property
    def name(self) -> str:
        mpi = "Open MPI" if is_openmpi(find_mpirun(self.python)) else "MPICH"
        if self.alone:
            return f"{mpi}, alone"
        return f"{mpi}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"

    def command(self, arguments: Sequence[str]) -> list[str]:
        # Each MPI has its own idea of whether its ranks write to a terminal.
        color = "yes" if sys.stdout.isatty() else "no"
        # Tests that do not depend on which MPI it is are run with the first.
        selected = f"parallel[{self.ranks}]" + ("" if self.with_once else " and not once")
        selected += " and alone" if self.alone else " and not alone"
        pytest = [self.python, "-m", "pytest", f"--color={color}", "-m", selected]
        if self.ranks > 1:
            # Several ranks would write to one cache at once.
            pytest = [*mpirun_command(self.python, self.ranks), *pytest, "-p", "no:cacheprovider"]
            return [*pytest, *arguments]
        # What has failed here is not what has failed with the other MPI.
        pytest += ["-o", f"cache_dir=.pytest_cache/{self.name}"]
        if self.workers > 1:
            # By files, for tests that share a fixture; in their order: some early ones take long.
            pytest += ["-n", str(self.workers), "--dist", "loadfile", "--no-loadscope-reorder"]
            # The time limit's usual way would take the worker with it.
            pytest += ["-o", "timeout_method=signal", "-o", "timeout=300"]
        return [*pytest, *arguments]


@dataclass(frozen=True)
class Outcome:
    """How a launch ended: in a word, in pytest's closing line, and when."""

    launch: Launch
    passed: bool
    verdict: str
    closing_line: str
    seconds: float
    ending: str  # the last lines, which say why if it failed


def run(launch: Launch, arguments: Sequence[str], timeout: float) -> Outcome:
    """Run one launch, show what it prints, and kill it when its time is up."""
    command = launch.command(arguments)
    print(f"\n>>> {launch.name}: {shlex.join(command)}", flush=True)
    start = time.monotonic()
    closing_line = ""
    ending: deque[str] = deque(maxlen=_ENDING)
    late = threading.Event()
    with tempfile.TemporaryDirectory(prefix="mpizero-tests-") as logs:
        # One hash seed for all ranks: sets then have the same order on each.
        env = launch_environment({"MPIZERO_TEST_LOGS": logs, "PYTHONHASHSEED": "0"})
        with started(command, cwd=ROOT, env=env, stdout=PIPE, stderr=STDOUT) as process:
            timer = threading.Timer(timeout, _kill, (process, late))
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                print(f"{launch.name:16} | {line}", end="", flush=True)
                ending.append(line)
                if found := _CLOSING_LINE.fullmatch(_COLOURS.sub("", line.strip())):
                    closing_line = found[1]
            process.wait()
            timer.cancel()
        left_behind = _logs_left_behind(Path(logs))
        print(left_behind, end="", flush=True)
        ending.append(left_behind)
    seconds = time.monotonic() - start
    if late.is_set():
        passed, verdict = False, "TIMED OUT"
    elif process.returncode == _NO_TESTS:
        passed, verdict = True, "no tests"
    else:
        passed = process.returncode == 0
        verdict = "ok" if passed else f"FAILED ({process.returncode})"
    return Outcome(launch, passed, verdict, closing_line, seconds, "".join(ending))


def run_all(launches: Sequence[Launch], arguments: Sequence[str], timeout: float) -> list[Outcome]:
    """Run launches of several ranks one by one, beside them those of one rank, and then the rest.

    Ranks use the cores all the time, and jobs that are waited for do not.
    """

    def run_some(some: Sequence[Launch]) -> list[Outcome]:
        return [run(launch, arguments, timeout) for launch in some]

    beside = [launch for launch in launches if not launch.alone]
    with ThreadPoolExecutor() as pool:
        serial = pool.submit(run_some, [launch for launch in beside if launch.ranks == 1])
        several = pool.submit(run_some, [launch for launch in beside if launch.ranks > 1])
        outcomes = serial.result() + several.result()
    outcomes += run_some([launch for launch in launches if launch.alone])
    return [run_again(outcome, arguments, timeout) for outcome in outcomes]


def run_again(first: Outcome, arguments: Sequence[str], timeout: float) -> Outcome:
    """Of the serial tests run those that failed beside others once more, alone.

    Some start jobs that must end within seconds: workers that take each other's cores may be too
    slow for that.
    """
    launch = first.launch
    if first.passed or first.verdict == "TIMED OUT" or launch.ranks > 1 or launch.alone:
        return first
    print("\n>>> what has failed beside other tests is run again, alone", flush=True)
    alone = run(replace(launch, workers=1), [*arguments, "--lf", "--lfnf=none"], timeout)
    if alone.verdict != "ok":
        return first
    both = f"{first.closing_line}; then alone: {alone.closing_line}"
    return replace(alone, closing_line=both, seconds=first.seconds + alone.seconds)


def _kill(process: Popen[str], late: threading.Event) -> None:
    late.set()
    print("\n>>> out of time: killed", flush=True)
    end(process)


def _logs_left_behind(logs: Path) -> str:
    """Ranks delete their logs at the end of their session: what is left is of a rank that died."""
    shown = ""
    for log in sorted(logs.glob("*.log")):
        tail = "\n".join(log.read_text().splitlines()[-50:])
        shown += f"\n>>> {log.stem} did not end its session; its log ends:\n{tail}\n"
    return shown


def main() -> int:
    """Run all launches; 0 if all passed."""
    own = sys.argv[1:]
    arguments: list[str] = []
    if "--" in own:
        cut = own.index("--")
        own, arguments = own[:cut], own[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--ranks", default=",".join(map(str, RANK_COUNTS)))
    workers = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=workers, help="for the tests on one rank")
    parser.add_argument("--timeout", type=float, default=3000.0, help="seconds for one launch")
    options = parser.parse_args(own)
    counts = [int(count) for count in options.ranks.split(",")]

    launches = [
        Launch(str(Path(python).absolute()), ranks, options.workers, number == 0)
        for number, python in enumerate(options.pythons)
        for ranks in counts
    ]
    launches += [replace(each, workers=1, alone=True) for each in launches if each.ranks == 1]
    outcomes = run_all(launches, arguments, options.timeout)
    for o in outcomes:
        if not o.passed:  # once more, where those who see only the end of a log will find it
            print(f"\n>>> how {o.launch.name} ended\n{o.ending}")
    print("\n>>> all launches")
    for o in outcomes:
        print(f"{o.launch.name:18} {o.verdict:12} {o.seconds:6.1f} s   {o.closing_line}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
