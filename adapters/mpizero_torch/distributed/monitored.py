"""The barrier that says who did not come."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from mpizero import World

_POLL_SECONDS = 1e-3


def monitored_barrier(world: World, seconds: float, wait_all_ranks: bool) -> None:
    """Rank 0 hears of all ranks, then tells them: as torch's, whose messages these are like."""
    deadline = time.monotonic() + seconds
    if world.size == 1:
        return
    tag = world.largest_tag
    if world.rank == 0:
        _hear_all(world, tag, deadline, seconds, wait_all_ranks)
        return
    world.send(np.zeros(1, np.int8), 0, tag)
    if not _in_time(world.recv(np.zeros(1, np.int8), 0, tag, asynchronous=True), deadline):
        raise RuntimeError(
            f"Rank {world.rank} successfully reached monitoredBarrier, but received errors while "
            "waiting for send/recv from rank 0. Please check rank 0 logs for faulty rank."
        )


def _hear_all(
    world: World, tag: int, deadline: float, seconds: float, wait_all_ranks: bool
) -> None:
    late: list[int] = []
    for rank in range(1, world.size):
        came = world.recv(np.zeros(1, np.int8), rank, tag, asynchronous=True)
        is_up = time.monotonic() > deadline
        if _in_time(came, deadline):
            continue
        if is_up and not late:  # of this rank nobody can say that it is late
            raise RuntimeError(
                f"[Rank 0]: Rank 0 timed out in monitoredBarrier after {seconds * 1000:.0f} ms, "
                f"before rank {rank} had its turn"
            )
        late.append(rank)
        if not wait_all_ranks:
            break
    if late:
        who = f"Ranks {', '.join(map(str, late))}" if wait_all_ranks else f"Rank {late[0]}"
        raise RuntimeError(
            f"[Rank 0]: {who} failed to pass monitoredBarrier in {seconds * 1000:.0f} ms"
        )
    for rank in range(1, world.size):
        world.send(np.zeros(1, np.int8), rank, tag)


def _in_time(message: Any, deadline: float) -> bool:
    while not message.done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
