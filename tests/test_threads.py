"""Which objects may be used from several threads: what their docstrings say holds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import numpy as np
import pytest

import mpizero

several_ranks = pytest.mark.parallel([2, 3, 4])


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start ``work`` on a thread; what it returns or raises."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="second")
    thread.start()
    return thread, found


def total(world: mpizero.World, value: float) -> float:
    return float(world.allreduce(np.full(3, value))[0])


@several_ranks
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_second_thread_is_refused_while_the_first_may_come(asynchronous: bool) -> None:
    world = mpizero.init().split(0)
    for _ in range(2):  # by a plan, the second time
        assert total(world, 1.0) == world.size
    ended: list[bool] = []

    def call() -> Any:
        try:
            return world.allreduce(np.ones(3), asynchronous=asynchronous)
        finally:
            ended.append(True)

    thread, found = in_thread(call)
    while not ended:  # runs, and might make a call
        time.sleep(0.001)
    thread.join()
    (error,) = found
    assert isinstance(error, mpizero.MpizeroError)
    for part in ("allreduce(float64", "'second'", "'MainThread'", "split(0)"):
        assert part in str(error)
    assert total(world, 2.0) == 2 * world.size  # what was refused has changed nothing
    world.close()


@several_ranks
def test_a_thread_that_waits_or_has_ended_hands_over() -> None:
    world = mpizero.init().split(0)
    size = world.size
    assert total(world, 1.0) == size
    for value in (2.0, 3.0):
        thread, found = in_thread(lambda value=value: total(world, value))
        thread.join()
        assert found == [value * size]
    assert total(world, 4.0) == 4 * size
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(total, world, 5.0).result() == 5 * size
    assert total(world, 6.0) == 6 * size
    world.close()


@several_ranks
def test_a_thread_that_waits_for_work_does_not_hand_over() -> None:
    world = mpizero.init().split(0)
    work: Queue[float | None] = Queue()
    done: Queue[float] = Queue()

    def serve() -> None:
        while (value := work.get()) is not None:
            done.put(total(world, value))

    thread, _ = in_thread(serve)
    work.put(1.0)
    assert done.get() == world.size
    while not _is_in(thread, "get"):
        time.sleep(0.001)
    with pytest.raises(mpizero.MpizeroError, match="'second' makes this World's calls"):
        total(world, 1.0)
    work.put(None)
    thread.join()
    assert total(world, 1.0) == world.size
    world.close()


def _is_in(thread: threading.Thread, function: str) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False


@several_ranks
def test_each_thread_has_a_world_of_its_own() -> None:
    job = mpizero.init()
    worlds = [job.split(0), job.split(0)]
    size = job.size

    def sums(world: mpizero.World, value: float) -> list[float]:
        return [total(world, value + i) for i in range(20)]

    threads = [in_thread(lambda w=w, v=v: sums(w, v)) for v, w in enumerate(worlds)]
    for value, (thread, found) in enumerate(threads):
        thread.join()
        assert found == [[(value + i) * size for i in range(20)]]
    for world in worlds:
        world.close()


@several_ranks
def test_any_thread_may_wait_for_a_handle_and_exchange_messages() -> None:
    world = mpizero.init().split(0)
    handle = world.allreduce(np.ones(3), asynchronous=True)
    waiting = [in_thread(lambda: float(handle.wait()[0])) for _ in range(2)]
    rank, size = world.rank, world.size

    def exchange(tag: int) -> float:
        got = np.zeros(1)
        coming = world.recv(got, (rank - 1) % size, tag, asynchronous=True)
        world.send(np.full(1, 10.0 * tag + rank), (rank + 1) % size, tag)
        coming.wait()
        return float(got[0])

    messages = [in_thread(lambda tag=tag: exchange(tag)) for tag in range(3)]
    for thread, found in waiting:
        thread.join()
        assert found == [size]
    for tag, (thread, found) in enumerate(messages):
        thread.join()
        assert found == [10 * tag + (rank - 1) % size]
    world.close()


@several_ranks
@pytest.mark.parametrize("progress", ["inline", "thread"])
def test_what_is_pending_goes_on_while_a_thread_waits_for_another(
    progress: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 waits for what rank 1 has begun first, and the other way round."""
    monkeypatch.setenv("MPIZERO_PROGRESS", progress)
    job = mpizero.init()
    worlds = [job.split(0), job.split(0)]
    order = [0, 1] if job.rank == 0 else [1, 0]
    arrays = [np.full(5, 1.0), np.full(5, 2.0)]
    handles = {k: worlds[k].allreduce(arrays[k], asynchronous=True) for k in order}
    for k in order:
        handles[k].wait()
    assert [each[0] for each in arrays] == [job.size, 2 * job.size]
    # In a blocking call of another World, which takes long, too.
    first = worlds[0].allreduce(arrays[0], asynchronous=True)
    if job.rank == 0:
        job.barrier()
        first.wait()
    else:
        first.wait()
        job.barrier()
    assert arrays[0][0] == job.size**2
    for world in worlds:
        world.close()
