"""Sharding a stream of batches whose order only the stream itself knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mpizero import World
from mpizero_torch import batch_weight
from mpizero_torch.data.position import Position
from mpizero_torch.random_state import unchanged


class ShardedStream:
    """Every size-th batch of ``source``, from the rank-th on; see ``shard``.

    All ranks read the whole stream, which must be the same on each (a dataset that knows how
    to read only its rank's part need not be sharded). Batches of one step weigh what they count in
    samples (the first axis of their first tensor); when the stream ends within a step, the ranks
    left over get the step's first batch with weight 0.
    """

    def __init__(self, source: Iterable[Any], world: World) -> None:
        self._source, self._world = source, world
        self._position = Position()
        self._told: int | None = None  # the epoch that the source was told last

    def __len__(self) -> int:
        """Steps of a whole epoch, if the source knows how many batches it has; else TypeError."""
        batches = len(self._source)  # type: ignore[arg-type]
        return (batches + self._world.size - 1) // self._world.size

    @property
    def epoch(self) -> int:
        """The epoch under way; between two loops, the next."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` begin epoch number ``epoch``, and tell the source or its dataset.

        After ``load_state_dict`` in that very epoch, the loop goes on where it was.
        """
        if self._position.set_epoch(epoch):
            self._tell(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the loop is, in batches of the source; for any number of ranks."""
        return {
            "epoch": self._position.epoch, "batches": self._position.done, "told": self._told,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``iter()`` go on where ``state_dict()`` was asked for.

        The stream is read from its beginning again, and what was trained on is passed over.
        """
        self._position.restore(state, "batches")
        if state["told"] is not None:
            self._tell(state["told"])

    def __iter__(self) -> Iterator[Any]:
        self._position.begin()
        epoch, done = self._position.epoch, self._position.done
        size, rank = self._world.size, self._world.rank
        # What passing over draws at random was drawn before the state was saved.
        with unchanged(done > 0):
            batches = iter(self._source)
            for _ in islice(batches, done):
                pass
        with batch_weight.loop():
            while step := list(islice(batches, size)):
                counts = [_samples(batch) for batch in step]
                active = rank < len(step)
                weight = counts[rank] * size / sum(counts) if active else 0.0
                batch_weight.set_relative(weight)
                done += len(step)
                self._position.advance(epoch, done)
                yield step[rank] if active else step[0]
        self._position.finish(epoch)

    def _tell(self, epoch: int) -> None:
        each: Any
        for each in (self._source, getattr(self._source, "dataset", None)):
            if hasattr(each, "set_epoch"):
                each.set_epoch(epoch)
                self._told = epoch
                return


def _samples(batch: Any) -> int:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    return 1
