"""Timing collectives: what ``mpizero bench`` and ``mpizero tune`` share."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np

from mpizero.api import World

_SAMPLE_SECONDS, _LONGEST_ROW = 1e-3, 100


def seconds_of(
    world: World, works: Mapping[str, Callable[[], object]], budget: float
) -> dict[str, float]:
    """The median seconds of each work, all ranks taking part; the same numbers on every rank.

    A sample counts from a barrier to the end on the slowest rank; of short works, the mean of as
    many in a row as take a millisecond, as osu_allreduce and nccl-tests do. The works take turns,
    so that what disturbs the machine disturbs them alike, in an order drawn anew each time: who
    comes after one that has used the same buffers finds them in the cache. ``budget``: seconds for
    all together.
    """
    names = list(works)
    samples: dict[str, list[float]] = {name: [] for name in names}
    repeats = {name: _repeats(world, work) for name, work in works.items()}
    rounds, end = 3, time.perf_counter() + budget
    done = 0
    while done < rounds:
        for name in random.Random(done).sample(names, len(names)):  # the same on every rank
            work = works[name]
            world.barrier()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                work()
            samples[name].append((time.perf_counter() - start) / repeats[name])
        done += 1
        # Rank 0's clock decides for all how many rounds there are.
        rounds += world.broadcast_object(time.perf_counter() < end and done >= rounds)
    slowest = world.allreduce(np.array([samples[name] for name in names]), "max")
    return {name: statistics.median(row) for name, row in zip(names, slowest.tolist(), strict=True)}


def _repeats(world: World, work: Callable[[], object]) -> int:
    """How often to do ``work`` in one sample. Tries it, which also warms up what it needs."""
    work()
    start = time.perf_counter()
    work()
    seconds = world.allreduce(time.perf_counter() - start, "max")
    return max(1, min(_LONGEST_ROW, int(_SAMPLE_SECONDS / seconds)))
