"""Node-shared memory for the buffers that torch communicates from and into.

``fully_shard`` copies parameters and gradients into buffers before it communicates them. Where
these lie in memory that all ranks of the node share, a reduce-scatter sums straight out of the
other ranks' buffers, and an all-gather copies straight from them. torch asks the group's backend
for such memory after ``model.set_allocate_memory_from_process_group_for_comm(True)``.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np
import torch

from mpizero import World

_MOST = 62  # buffers of one size: a bit for each in an integer


class SharedBuffers:
    """Buffers of node-shared memory, used again when no tensor of theirs is left on any rank."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._buffers: dict[int, list[Any]] = defaultdict(list)  # by size in bytes
        self._free: dict[int, int] = defaultdict(int)  # their numbers, as bits

    def tensor(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised flat tensor. Collective: all ranks ask for the same, in one order.

        Ranks let go of a buffer at their own times, so they agree on which one is free.
        """
        nbytes = count * dtype.itemsize
        if nbytes == 0:
            return torch.empty(0, dtype=dtype)
        buffers = self._buffers[nbytes]
        common = np.array([self._free[nbytes]], np.int64)
        self._world.allreduce(common, "band")
        mask = int(common[0])
        if mask:
            number = (mask & -mask).bit_length() - 1
            self._free[nbytes] &= ~(1 << number)
        elif len(buffers) == _MOST:
            return torch.empty(count, dtype=dtype)
        else:
            number = len(buffers)
            buffers.append(self._world.allocate(nbytes, np.uint8))
        lent = buffers[number][:]
        weakref.finalize(lent, partial(self._give_back, nbytes, number)).atexit = False
        return torch.from_numpy(lent).view(dtype)

    def _give_back(self, nbytes: int, number: int) -> None:
        self._free[nbytes] |= 1 << number
