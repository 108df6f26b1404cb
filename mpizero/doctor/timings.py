"""A quick look at latency and bandwidth, all ranks at once: seconds, not a benchmark."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np

from mpizero.api import World
from mpizero.doctor.facts import Timings
from mpizero.measure import seconds_of

_SMALL, _LARGE = 64, 64_000_000
_SECONDS = 0.5  # for each size


def measure(world: World) -> Timings:
    """Time all-reduces of 64 B and of 64 MB of float32, and a copy of the latter. Collective."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a small /dev/shm has a line of its own
        small, large = (world.allocate(size // 4, np.float32) for size in (_SMALL, _LARGE))
    copy = np.ones_like(large)
    correct = _is_right(world, small) and _is_right(world, large)
    quick = seconds_of(world, {"small": partial(world.allreduce, small)}, _SECONDS)
    large[...] = 0  # it is added up again and again
    works = {
        "all-reduce": partial(world.allreduce, large),
        "copy": partial(np.copyto, copy, large),
    }
    slow = seconds_of(world, works, _SECONDS)
    return Timings(_SMALL, quick["small"], _LARGE, slow["all-reduce"], slow["copy"], correct)


def _is_right(world: World, array: Any) -> bool:
    """Small whole numbers, whose sums are exact."""
    array[...] = world.rank % 7 + 1
    world.allreduce(array)
    right = bool((array == sum(rank % 7 + 1 for rank in range(world.size))).all())
    array[...] = 0
    return bool(world.allreduce(int(right), "min"))
