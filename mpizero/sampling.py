"""Which samples a rank trains on: deterministic, disjoint, complete, and the same number of steps.

A global batch holds batch_size samples per rank. Every rank takes its part of the same global
batch, so that n ranks with batch_size b see what one process with batch_size n*b sees, in the
same steps. The last global batch may be short: then parts differ in length, and each comes with
the weight that makes the mean over ranks the mean over samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpizero.errors import ArgumentError


@dataclass(frozen=True)
class Share:
    """This rank's share of each global batch, in proportion to ``speeds[rank]``."""

    rank: int
    speeds: tuple[float, ...]

    @classmethod
    def of(cls, rank: int, size: int, speeds: Sequence[float] | None, function: str) -> Share:
        """Check the arguments; equal shares if ``speeds`` is None."""
        if speeds is None:
            return cls(rank, (1.0,) * size)
        given = tuple(float(speed) for speed in speeds)
        if len(given) != size or not all(speed > 0 for speed in given):
            raise ArgumentError(function, "speeds", str(given), f"{size} numbers > 0, one a rank")
        return cls(rank, given)

    def cut(self, count: int) -> list[int]:
        """How many of ``count`` samples each rank takes (largest remainders round up)."""
        exact = np.array(self.speeds) / sum(self.speeds) * count
        counts = np.floor(exact + 1e-9).astype(int)
        left = count - int(counts.sum())
        for rank in np.argsort(counts - exact, kind="stable")[:left]:
            counts[rank] += 1
        return [int(taken) for taken in counts]

    def part(self, count: int) -> slice:
        """This rank's part of a global batch of ``count`` samples; may be empty."""
        counts = self.cut(count)
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def weight(self, count: int) -> float:
        """Samples taken over the mean of all ranks: 1 for equal parts, 0 for none."""
        return self.cut(count)[self.rank] * len(self.speeds) / count


@dataclass(frozen=True)
class Batch:
    """Sample indices for one step of this rank, and how much their mean counts (see ``Share``).

    A rank for which nothing is left gets one sample of another rank's part with weight 0, so that
    it can take the step with all others. ``stop``: how many samples of the epoch all ranks have
    taken with this step.
    """

    indices: np.ndarray[Any, np.dtype[np.int64]]
    weight: float
    stop: int


class ShardedBatches:
    """This rank's batches of a data set of ``count`` samples.

    ``batch_size`` is the mean number of samples per rank and step; ``speeds`` (one positive
    number a rank) makes faster ranks take more. ``shuffle`` permutes anew in each epoch, from
    ``seed`` and the epoch's number alone. ``drop_last`` leaves out a short last global batch.
    ``len()`` is the number of steps of an epoch, the same on every rank.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        rank: int,
        size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        speeds: Sequence[float] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ArgumentError("ShardedBatches()", "batch_size", str(batch_size), "1 or more")
        if count < 0:
            raise ArgumentError("ShardedBatches()", "count", str(count), "0 or more")
        self.count, self.batch_size, self.size = count, batch_size, size
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.share = Share.of(rank, size, speeds, "ShardedBatches()")
        # Samples of a step over all ranks. Not ``batch_size`` for each where ranks have been lost.
        self.width = batch_size * size

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.width)
        return whole + (rest > 0 and not self.drop_last)

    def order(self, number: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """All samples in the order of epoch ``number``, the same on every rank."""
        if self.shuffle:
            return np.random.default_rng((self.seed, number)).permutation(self.count)
        return np.arange(self.count)

    def epoch(
        self, number: int, order: Sequence[int] | None = None, skip: int = 0
    ) -> Iterator[Batch]:
        """The batches of epoch ``number``, over the samples in ``order`` if that is given.

        The first ``skip`` samples have been taken before, perhaps by another number of ranks.
        """
        indices = self.order(number) if order is None else np.asarray(order, dtype=np.int64)
        width = self.width
        for start in range(skip, self.count, width):
            together = indices[start : start + width]
            if len(together) < width and self.drop_last:
                return
            own = together[self.share.part(len(together))]
            weight = self.share.weight(len(together))
            yield Batch(own if len(own) else together[:1], weight, start + len(together))
