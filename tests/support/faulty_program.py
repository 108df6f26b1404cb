"""A program that something happens to: what the fault campaign starts.

    mpirun -n 3 python tests/support/faulty_program.py '{"act": "SIGKILL", "moment": "inside", ...}'

``ranks`` are those it happens to, at the given ``moment`` of step ``step``. What happens is one of
``ACTS`` here, or of those that need a model (``faulty_training``). The culprit writes the time into
the log, and every rank that comes to the end says so there.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import mmap
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import mpizero
from mpizero import diagnostics
from mpizero.world.launcher import read_launch

LARGE = 4 << 20  # elements: a call on them takes long enough to be in the middle of it
SLOW_SECONDS = 5.0  # of a rank that is only late


class Fault:
    """What happens to this rank, if it is one of those; ``world`` and arrays are set on the way."""

    def __init__(self, config: dict[str, Any]) -> None:
        launch = read_launch(os.environ)
        self.rank = launch.rank if launch is not None else 0
        self.config = config
        self.step = -1
        self.is_culprit = self.rank in config["ranks"]
        self.acts: dict[str, Callable[[Fault], Any]] = dict(ACTS)
        self.world: Any = None
        self.x: Any = None
        self._done = False

    def at(self, moment: str) -> Any:
        """The program has come to this moment: act, if it is the one."""
        if self.is_culprit and not self._done and moment == self.config["moment"]:
            if -1 < self.step < self.config["step"]:
                return None
            self._done = True
            if moment == "inside":  # begun now, to act when the next call is under way
                threading.Thread(target=self._act_inside, daemon=True).start()
                return None
            return self.act()
        return None

    def act(self) -> Any:
        self.tell("fault", time.time(), self.step)
        return self.acts[self.config["act"]](self)

    def tell(self, *what: object) -> None:
        handle = os.open(self.config["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, (" ".join(map(str, what)) + "\n").encode())
        os.close(handle)

    def step_done(self) -> None:
        self.tell("step", time.time(), self.step)

    def _act_inside(self) -> None:
        self._await_open_call()
        self.tell("fault", time.time(), self.step)
        # Telling gave Python's lock away. From here on this thread keeps it, so that the main one,
        # found in a call, cannot have left it when the fault happens.
        self._await_open_call()
        self.acts[self.config["act"]](self)

    def _await_open_call(self) -> None:
        record = diagnostics.recorder().record
        while (begun := record.oldest_open()) is None or time.monotonic_ns() - begun < 1_000_000:
            time.sleep(0.0002)


def fail(fault: Fault) -> None:
    raise ValueError("injected: the learning rate\nis negative")


def loop(fault: Fault) -> None:
    while True:
        pass


def wait_for_a_lock(fault: Fault) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def read_a_pipe_without_writer(fault: Fault) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipe"
        os.mkfifo(path)
        path.read_bytes()


def read_beyond_the_end_of_a_mapped_file(fault: Fault) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(mmap.PAGESIZE)
        mapped = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        file.truncate(0)
        mapped[0]


def take_all_memory(fault: Fault) -> None:
    """Until the kernel ends it: the campaign has limited the memory of the job."""
    taken = []
    while True:
        taken.append(np.ones(1 << 22))


def take_more_than_allowed(fault: Fault) -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    np.ones(1 << 28)


def fork(child: Callable[[], Any]) -> Callable[[Fault], None]:
    """In a child that the rank waits for."""

    def act(fault: Fault) -> None:
        import multiprocessing

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        fault.tell("child", process.exitcode)

    return act


def raise_in_a_child() -> None:
    raise ValueError("injected: in a child")


def raise_in_a_thread(fault: Fault) -> None:
    thread = threading.Thread(target=fail, args=(fault,))
    thread.start()
    thread.join()


def tell_the_launcher(number: signal.Signals) -> Callable[[Fault], None]:
    """To the process above all others of this job, which have a word in their environment."""

    def act(fault: Fault) -> None:
        word, above, launcher = os.environ["FAULT_JOB"].encode(), os.getppid(), 0
        while above > 1 and word in Path(f"/proc/{above}/environ").read_bytes():
            launcher = above
            above = int(Path(f"/proc/{above}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(launcher, number)

    return act


def ask(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(2)


def send(name: str) -> Callable[[Fault], None]:
    """A signal to itself."""
    number = getattr(signal, name)
    return lambda fault: os.kill(os.getpid(), number)


def leave(fault: Fault) -> str:
    return "leave"


def write_protected(fault: Fault) -> None:
    protected = np.ones(4, np.float32)
    protected.flags.writeable = False
    fault.world.allreduce(protected)


def sleep_under_a_stopped_launcher(fault: Fault) -> None:
    tell_the_launcher(signal.SIGSTOP)(fault)
    time.sleep(1000)


# What happens, by name. "leave" tells the loop to end.
ACTS: dict[str, Callable[[Fault], Any]] = {
    "nothing": lambda fault: None,
    "raise": fail,
    "sys.exit(3)": lambda fault: sys.exit(3),
    "sys.exit(0)": lambda fault: sys.exit(0),
    "os._exit(0)": lambda fault: os._exit(0),
    "os._exit(7)": lambda fault: os._exit(7),
    "ctypes.string_at(0)": lambda fault: ctypes.string_at(0),
    "os.abort()": lambda fault: os.abort(),
    "mapped file": read_beyond_the_end_of_a_mapped_file,
    "all memory": take_all_memory,
    "more memory than allowed": take_more_than_allowed,
    "loop": loop,
    "C": lambda fault: sum(range(10**12)),
    "sleep": lambda fault: time.sleep(1000),
    "slow": lambda fault: time.sleep(SLOW_SECONDS),
    "lock": wait_for_a_lock,
    "pipe": read_a_pipe_without_writer,
    "ask": ask,
    "leave": leave,
    "another collective": lambda fault: fault.world.broadcast(fault.x),
    "another shape": lambda fault: fault.world.allreduce(np.ones(5, np.float32)),
    "another dtype": lambda fault: fault.world.allreduce(fault.x.astype(np.float64)),
    "another op": lambda fault: fault.world.allreduce(fault.x, "max"),
    "another root": lambda fault: fault.world.broadcast(fault.x, root=1),
    "another algorithm": lambda fault: fault.world.allreduce(fault.x, algorithm="ring"),
    "write-protected": write_protected,
    "asynchronous": lambda fault: fault.world.allreduce(fault.x, asynchronous=True).wait(),
    "child raises": fork(raise_in_a_child),
    "child is killed": fork(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "child exits": fork(lambda: sys.exit(3)),
    "child quits": fork(lambda: os._exit(3)),
    "thread raises": raise_in_a_thread,
    **{
        f"{name} to the launcher": tell_the_launcher(getattr(signal, name))
        for name in ("SIGINT", "SIGTERM", "SIGKILL")
    },
    "sleep under a stopped launcher": sleep_under_a_stopped_launcher,
    **{name: send(name) for name in ("SIGKILL", "SIGTERM", "SIGSTOP", "SIGILL", "SIGINT")},
}


def sum_arrays(fault: Fault) -> None:
    """The training without a model: collectives, of which the ranks know the sums."""
    config = fault.config
    world = fault.world = mpizero.init(elastic=config.get("elastic", False))
    fault.x = x = np.ones(4, np.float32)
    large = world.allocate(LARGE, np.float32)
    for fault.step in range(1000 if config["moment"] == "inside" else config["steps"]):
        if fault.at("before") == "leave":
            break
        if config["call"] == "broadcast":
            world.broadcast(x)
        elif config["call"] == "node_shared":
            large[:] = 1
            world.allreduce(large, algorithm="node_shared")
        elif config["call"] == "large":
            large[:] = 1
            world.allreduce(large)
        else:
            x[:] = 1
            asynchronous = config["call"] == "asynchronous"
            handle = world.allreduce(x, asynchronous=asynchronous)
            if asynchronous:
                handle.wait()
            if not (x == world.size).all():
                raise SystemExit(f"a sum is wrong: {x}")
        fault.step_done()
        fault.at("inside")
        fault.at("after")


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    config = json.loads(sys.argv[1])
    fault = Fault(config)
    fault.at("before init")
    if config["moment"] == "in init" and fault.is_culprit:
        diagnostics.watch = lambda *_: fault.at("in init")  # type: ignore[assignment]
    if config["training"] == "arrays":
        sum_arrays(fault)
    else:
        from faulty_training import train

        train(fault)
    fault.tell("done", fault.rank)
    # What is registered last is called first: before mpizero's end, and MPI's.
    atexit.register(fault.at, "at exit")
    fault.at("at the end")


if __name__ == "__main__":
    main()
