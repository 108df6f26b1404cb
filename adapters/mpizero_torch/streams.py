"""Sharding a stream of batches whose order only the stream itself knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mpizero import World
from mpizero_torch import batch_weight


class ShardedStream:
    """Every size-th batch of ``source``, from the rank-th on; see ``shard``.

    All ranks read the whole stream, which must be the same on each (a dataset that knows how
    to read only its rank's part need not be sharded). Batches of one step weigh what they count in
    samples (the first axis of their first tensor); when the stream ends within a step, the ranks
    left over get the step's first batch with weight 0.
    """

    def __init__(self, source: Iterable[Any], world: World) -> None:
        self._source, self._world = source, world

    def __len__(self) -> int:
        """Steps, if the source knows how many batches it has; else TypeError."""
        batches = len(self._source)  # type: ignore[arg-type]
        return (batches + self._world.size - 1) // self._world.size

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to a source that wants to know."""
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        batches, size, rank = iter(self._source), self._world.size, self._world.rank
        with batch_weight.loop():
            while step := list(islice(batches, size)):
                counts = [_samples(batch) for batch in step]
                active = rank < len(step)
                weight = counts[rank] * size / sum(counts) if active else 0.0
                batch_weight.set_relative(weight)
                yield step[rank] if active else step[0]


def _samples(batch: Any) -> int:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    return 1
