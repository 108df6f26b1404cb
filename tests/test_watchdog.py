"""Nothing hangs: who waits for whom is said, and the job ends. And it may be asked meanwhile."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import mpizero
from mpizero.diagnostics import recorder
from mpizero.diagnostics.current import seconds_of
from mpizero.diagnostics.record import Made
from mpizero.diagnostics.recorder import Recorder
from mpizero.diagnostics.report import report
from mpizero.diagnostics.views import View, as_ranges, hopeless, members, stuck_calls
from support.launch import (
    Finished,
    launch_environment,
    mpirun,
    mpirun_command,
    started,
)

PROGRAM = """
import ctypes, os, signal, sys, time
import numpy as np, mpizero
world = mpizero.init(timeout={timeout})
x = np.ones(4, np.float32)

def train():
    for step in range(5):
        world.allreduce(x)
    if world.rank == 1:
        print("stuck", flush=True)
        {stuck}
    world.allreduce(np.ones(9))

train()
"""

INSPECT = "from mpizero.cli import main; main()"

STUCK = {
    "in a loop": "while True: pass",
    "asleep": "time.sleep(1000)",
    "in C, with Python's lock": "sum(range(10**12))",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(1000)",
}


def run(stuck: str, timeout: float = 3, n: int = 3, **env: str) -> Finished:
    return mpirun(n, PROGRAM.format(stuck=stuck, timeout=timeout), timeout=40, env=env)


@pytest.mark.parametrize("how", STUCK)
def test_a_rank_that_does_not_come_is_named_and_the_job_ends(how: str) -> None:
    result = run(STUCK[how])
    assert result.returncode != 0
    error = result.stderr
    assert len(re.findall(r"^mpizero: rank [02] has waited for \d+ s", error, re.M)) == 1
    assert "ranks 0, 2 wait in allreduce(float64, shape (9,)" in error
    assert re.search(r"missing: rank 1 \(pid \d+ on .*last did allreduce\(float32, .*call 5", error)
    assert ("is stopped" in error) == (how == "stopped")
    of_rank_1 = error[error.index("  rank 1, Python stacks") :]
    assert re.search(r'MainThread.*:\n +File "<string>", line 12 in train', of_rank_1), error


def test_a_rank_that_leaves_early_is_found_long_before_the_time_is_up() -> None:
    result = run("return", timeout=300)
    assert result.returncode != 0
    assert "mpizero: rank 1 has come to the end of the program, and others wait" in result.stderr


def test_with_a_timeout_of_zero_nothing_ends_a_job_for_waiting() -> None:
    """They wait for each other for ever, which is said, until the program itself has enough."""
    program = (
        "import signal, sys, mpizero\nw = mpizero.init()\n"
        "mine, other = w.split(0), w.split(0)\n"
        "signal.signal(signal.SIGALRM, lambda *_: sys.exit(3))\nsignal.alarm(9)\n"
        "(mine if w.rank else other).barrier()\n"
    )
    result = mpirun(2, program, env={"MPIZERO_TIMEOUT": "0"})
    assert result.returncode not in (0, 124), result.stderr
    assert "the ranks wait for each other in different calls. The job goes on" in result.stderr
    assert "ends here" not in result.stderr


@pytest.mark.parametrize("progress", ["thread", "inline"])
def test_ranks_that_wait_for_each_other_are_found_before_the_time_is_up(progress: str) -> None:
    result = run(
        "world.allreduce(x, asynchronous=True).wait()", timeout=300, MPIZERO_PROGRESS=progress
    )
    assert result.returncode != 0
    assert "mpizero: the ranks wait for each other in different calls" in result.stderr
    assert "rank 1 waits in allreduce(float32, shape (4,)" in result.stderr


def test_a_rank_of_another_node_is_seen_through_its_neighbour() -> None:
    result = run("while True: pass", n=4, timeout=4, MPIZERO_RANKS_PER_NODE="2")
    assert result.returncode != 0
    assert result.stderr.count("has waited for") == 1, result.stderr
    assert re.search(r"missing: rank 1 \(pid", result.stderr)
    assert "ranks 0, 2-3 wait in" in result.stderr or "ranks 0, 2, 3 wait in" in result.stderr
    assert "  rank 1, Python stacks" in result.stderr


def test_a_slow_rank_is_waited_for() -> None:
    result = run("time.sleep(5)", timeout=60)
    assert result.returncode == 0, result.stderr
    assert "mpizero:" not in result.stderr


def test_zero_is_for_ever_and_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPIZERO_TIMEOUT", raising=False)
    assert seconds_of(None) == 600 and seconds_of(0) is None and seconds_of(1.5) == 1.5
    monkeypatch.setenv("MPIZERO_TIMEOUT", "20")
    assert seconds_of(None) == 20
    for given in (-1, float("nan"), float("inf")):
        with pytest.raises(mpizero.ArgumentError, match="timeout"):
            seconds_of(given)
    monkeypatch.setenv("MPIZERO_TIMEOUT", "ten")
    with pytest.raises(mpizero.ArgumentError, match="MPIZERO_TIMEOUT"):
        seconds_of(None)


@pytest.mark.parametrize("asked_by", ["signal", "command"])
def test_a_running_job_may_be_asked_and_goes_on(asked_by: str) -> None:
    program = PROGRAM.format(stuck="time.sleep(8)", timeout=60) + "\nprint('done', flush=True)\n"
    command = [*mpirun_command(sys.executable, 3), sys.executable, "-c", program]
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        started(command, env=launch_environment(), stdout=out, stderr=err) as process,
    ):
        rank_1 = _rank_that_sleeps(process.pid)
        if asked_by == "signal":
            os.kill(rank_1, signal.SIGUSR2)
        else:
            answer = subprocess.run(
                [sys.executable, "-c", INSPECT, "inspect", str(rank_1)],
                capture_output=True, text=True, env=launch_environment(), timeout=30,
            )  # fmt: skip
            assert answer.returncode == 0, answer.stderr
        assert process.wait(40) == 0
        out.seek(0)
        err.seek(0)
        shown, error = out.read(), err.read()
    assert shown.count("done") == 3
    found = error if asked_by == "signal" else answer.stdout
    assert found.count("mpizero: ") == 1
    assert "ranks 0, 2 wait in allreduce(float64, shape (9,)" in found
    assert "line 12 in train" in found
    if asked_by == "command":
        assert "mpizero: " not in error  # the job's own watchdogs left it to the command


def test_a_rank_whose_threads_run_survives_being_asked() -> None:
    """Frames that go while they are read have crashed ranks."""
    program = """
import os, subprocess, sys, threading, time
import mpizero

world = mpizero.init()
if world.rank == 1:
    def deep(n):
        return deep(n - 1) if n else [i for i in range(3)]
    def work():
        while True:
            deep(30)
            exec("def f(): return 1")
    threading.Thread(target=work, daemon=True).start()
    shots = f"import os, time\\nfor _ in range(20000): os.kill({os.getpid()}, 12); time.sleep(1e-4)"
    asking = subprocess.Popen([sys.executable, "-c", shots])
    while asking.poll() is None:
        time.sleep(1e-3)  # without Python's lock
    assert asking.returncode == 0
world.barrier()
"""
    result = mpirun(2, program, timeout=40)
    assert result.returncode == 0, result.stderr


def test_a_job_that_is_not_there_is_said_to_be_none() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", INSPECT, "inspect", "nowhere"],
        capture_output=True, text=True, env=launch_environment(), timeout=30,
    )  # fmt: skip
    assert answer.returncode == 1
    assert "no job" in answer.stderr


def test_nothing_is_left_of_a_job_that_is_killed() -> None:
    """Neither of our memory, nor of MPI's own."""
    before = set(os.listdir("/dev/shm"))
    result = run("w = world.allocate(99, 'float32'); os.kill(os.getpid(), signal.SIGKILL)")
    assert result.returncode != 0
    mine = {name for name in set(os.listdir("/dev/shm")) - before if _is_stale(name)}
    assert not mine


def test_an_os_exit_of_one_rank_is_no_success() -> None:
    result = run("os._exit(0)")
    assert result.returncode != 0
    assert "[rank 1] left by os._exit(0)" in result.stderr


def test_a_crash_shows_where() -> None:
    result = run("ctypes.string_at(0)")
    assert result.returncode != 0
    assert "Segmentation fault" in result.stderr and "line 12 in train" in result.stderr


# What follows from what is seen: without any rank.


MAIN, OTHER = 1, 2  # threads


def made(
    what: str, sequence: int, lane: str = "0-2 blocking", *, done: bool = False, by: int = MAIN
) -> Made:
    took = 1.0 if done else None
    return Made(sequence, what, "train.py:7 in main", lane, sequence, 16, 5.0, took, by)


def view(
    rank: int, *calls: Made, state: str = "running", threads: tuple[int, ...] = (MAIN,)
) -> View:
    return View(rank, "n1", 100 + rank, state, calls, threads=threads)


def test_who_waits_for_whom() -> None:
    views = [view(0, made("a", 3)), view(1, made("z", 2, done=True)), view(2, made("a", 3))]
    (stuck,) = stuck_calls(views)
    assert stuck.waiting == (0, 2) and stuck.missing == (1,)
    assert hopeless(views, 3) == ""
    gone = [views[0], view(1, made("z", 2, done=True), state="gone"), views[2]]
    assert "rank 1 has died" in hopeless(gone, 3)


def test_a_call_to_which_all_have_come_may_go_on() -> None:
    views = [view(rank, made("a", 3)) for rank in range(3)]
    assert stuck_calls(views)[0].missing == () and hopeless(views, 3) == ""
    assert "data is moving" in report("asked", views)


def test_a_rank_that_is_stopped_within_a_call_is_told() -> None:
    views = [view(0, made("a", 3)), view(1, made("a", 3), state="stopped"), view(2, made("a", 3))]
    text = report("asked", views)
    assert "in it, rank 1 (pid 101 on n1) is stopped" in text
    assert "all of its ranks have come" in text and "data is moving" not in text


def test_sub_worlds_wait_for_their_own_ranks_only() -> None:
    views = [view(0, made("a", 1, "0-1 blocking")), view(1), view(2, state="left")]
    assert stuck_calls(views)[0].missing == (1,) and hopeless(views, 3) == ""


TWO = "0-1 blocking"
MESSAGES = ["0-1 messages 0 to 1 of 0-1 blocking", "0-1 messages 1 to 0 of 0-1 blocking"]
APART = "the ranks wait for each other in different calls"


def test_ranks_that_wait_in_different_calls_wait_for_ever() -> None:
    views = [view(0, made("a", 1, TWO)), view(1, made("b", 1, "0-1 (2) blocking"))]
    assert hopeless(views, 2) == APART
    assert hopeless(views[:1], 2) == ""  # of the other nothing is known


def test_a_thread_that_runs_may_make_the_call_that_others_wait_for() -> None:
    both = (MAIN, OTHER)
    listening = [view(r, made("recv", 1, MESSAGES[1 - r], by=OTHER), threads=both) for r in (0, 1)]
    assert hopeless(listening, 2) == ""
    main = [view(r, made("recv", 1, MESSAGES[1 - r]), threads=both) for r in (0, 1)]
    assert hopeless(main, 2) == ""
    waiting = [
        view(r, made("recv", 1, MESSAGES[1 - r]), made("a", 1, f"0-1 ({r}) blocking", by=OTHER),
             threads=both)
        for r in (0, 1)
    ]  # fmt: skip
    assert hopeless(waiting, 2) == APART
    assert hopeless([*waiting[:1], view(1, *waiting[1].calls, threads=())], 2) == ""  # not known


def test_what_is_under_way_is_not_waited_for() -> None:
    """Asynchronous calls of different orders, while the programs compute."""
    views = [view(r, made("a", 1, f"0-1 ({r}) asynchronous")) for r in (0, 1)]
    assert hopeless(views, 2) == ""
    waited = [
        view(r, made("a", 1, f"0-1 ({r}) asynchronous"), made("waiting for a", 1, "0-1 waiting"))
        for r in (0, 1)
    ]
    assert hopeless(waited, 2) == APART


def test_a_rank_that_has_left_ends_those_whose_main_thread_waits_for_it() -> None:
    left = view(1, state="left")
    assert "rank 1 has come to the end" in hopeless([view(0, made("a", 1, TWO)), left], 2)
    listener = view(0, made("recv", 1, MESSAGES[1], by=OTHER), threads=(MAIN, OTHER))
    assert hopeless([listener, left], 2) == ""
    still_there = view(1, state="left", threads=(MAIN, OTHER))
    assert hopeless([view(0, made("a", 1, TWO)), still_there], 2) == ""
    waits = made("waiting for a", 1, "0-1 waiting")
    under_way = made("a", 1, "0-1 asynchronous")
    assert "rank 1 has come to the end" in hopeless([view(0, under_way, waits), left], 2)
    another = made("b", 1, "0,2 asynchronous")  # it may be this that it waits for
    assert hopeless([view(0, under_way, another, waits), left], 3) == ""


LISTENERS = """
import sys, threading, time
import numpy as np, mpizero

world, mode = mpizero.init(timeout=60), sys.argv[1]
other = 1 - world.rank
x = np.zeros(1)
parts = [world.split(0), world.split(0)]


def receive():
    world.recv(x, other, 3)


def serve(number):
    if number != world.rank:
        time.sleep(6)
    parts[number].allreduce(np.ones(3))


if mode == "listen":
    threads = [threading.Thread(target=receive)]
    work = lambda: (time.sleep(6), world.send(np.ones(1), other, 3))
elif mode == "groups":
    threads = [threading.Thread(target=serve, args=(number,)) for number in (0, 1)]
    work = lambda: None
elif mode == "main":
    send = lambda: (time.sleep(6), world.send(np.ones(1), other, 3))
    threads, work = [threading.Thread(target=send)], receive
elif mode == "asynchronous":
    def work():
        first = parts[world.rank].allreduce(np.ones(3), asynchronous=True)
        time.sleep(6)
        parts[other].allreduce(np.ones(3), asynchronous=True).wait()
        first.wait()
    threads = []
elif mode == "end":
    threads = []
    threading.Thread(target=receive, daemon=True).start()
    work = lambda: time.sleep(6 * world.rank)
for thread in threads:
    thread.start()
work()
for thread in threads:
    thread.join()
print("went on", flush=True)
"""


@pytest.mark.parametrize("mode", ["listen", "groups", "main", "asynchronous", "end"])
def test_threads_that_wait_while_others_compute_are_no_deadlock(mode: str) -> None:
    env = {"MPIZERO_PROGRESS": "thread"}  # what is under way goes on while another is waited for
    result = mpirun(2, ["-c", LISTENERS, mode], timeout=60, env=env)
    assert result.returncode == 0 and result.stdout.count("went on") == 2, result.stderr
    assert "mpizero:" not in result.stderr


def test_ranges() -> None:
    assert as_ranges([5, 0, 1, 2]) == "0-2,5"
    assert members("0-2,5 (2) blocking") == {0, 1, 2, 5}


def test_a_record_keeps_the_last_calls_and_the_line_of_the_user() -> None:
    recorder = Recorder(0, 1)
    lane = recorder.lane("0", "blocking")
    for _ in range(600):
        lane.end(lane.begin("allreduce(...)", 16, recorder.here()))
    lane.begin("broadcast(...)", 1 << 38, recorder.here())
    calls = recorder.record.calls(time.monotonic_ns())
    assert len(calls) == 512 and calls[-1].number == 601 and calls[-1].is_open
    assert calls[-1].nbytes == 1 << 38 and calls[-1].sequence == 601
    assert calls[-1].line.startswith(f"{Path(__file__).name}:")
    assert recorder.record.oldest_open() is not None


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_call_that_a_rank_refuses_counts_on_all(asynchronous: bool) -> None:
    """Or the ranks' numbers of calls, by which they are put beside each other, part for good."""
    world = mpizero.init()
    options = {"asynchronous": asynchronous, "op": "nonsense" if world.rank == 1 else "sum"}
    with pytest.raises((mpizero.ArgumentError, mpizero.MismatchError)):
        handle = world.allreduce(np.ones(3), **options)
        handle.wait()
    ring = recorder().record.calls(time.monotonic_ns())
    last = {call.lane: call.sequence for call in ring if call.lane.startswith("0-")}
    everyones = world.gather_objects(last)
    kind = "asynchronous" if asynchronous else "blocking"
    assert len({each[f"0-{world.size - 1} {kind}"] for each in everyones}) == 1


def test_a_full_record_of_names_says_so() -> None:
    recorder = Recorder(0, 1)
    for number in range(1000):
        lane = recorder.lane(f"{number} " + "x" * 900, "blocking")
    lane.end(lane.begin("barrier"))
    last = recorder.record.calls(time.monotonic_ns())[-1]
    assert "no room" in last.lane and last.what == "barrier"


def _is_stale(name: str) -> bool:
    """Is it a file that no process has mapped (other jobs may run beside this test)?"""
    if name.startswith("fake_cuda."):  # messages between ranks of tests without a GPU
        return False
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if name in maps.read_text():
                return False
        except OSError:
            continue
    return True


def _rank_that_sleeps(launcher: int) -> int:
    """The process of rank 1, once it has gone to sleep."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        time.sleep(0.2)
        from mpizero.diagnostics.jobs import jobs

        for job in jobs():
            if str(launcher) in job.names and len(job.records) == 3:
                calls = job.records[0].calls(time.monotonic_ns())
                if calls and calls[-1].is_open and calls[-1].sequence == 6:
                    return job.pids[1]
    raise AssertionError("the job did not start")
