"""``shard``: arrays dealt to the ranks, a batch at a time, in as many steps on each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import mpizero
from mpizero import ArgumentError, World
from mpizero.adapting import ShardedBatches


class Batch(NamedTuple):
    """A rank's rows for one step, and how much their mean counts.

    ``weight``: how many rows they are; 0 for the one row of a rank for which none was left. Given
    to ``value_and_grad(weight=...)`` it makes means over ranks the means over rows.
    """

    rows: Any
    weight: Any  # float32: a program is compiled once for all


class ShardedArrays:
    """Batches of a pytree of arrays with equal first axes: iterate over one epoch after another.

    n ranks with ``batch_size`` b see the rows that one process with n*b sees, in the same steps.
    ``epoch`` is the number of the next one; setting it goes on from there.
    """

    def __init__(self, arrays: Any, batches: ShardedBatches) -> None:
        self.epoch = 0
        self._arrays, self._batches = arrays, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        number, self.epoch = self.epoch, self.epoch + 1
        for batch in self._batches.epoch(number):
            rows = jax.tree_util.tree_map(lambda x, at=batch.indices: x[at], self._arrays)
            count = len(batch.indices) if batch.weight else 0
            yield Batch(rows, np.float32(count))


def shard(
    arrays: Any,
    batch_size: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool = False,
    world: World | None = None,
) -> ShardedArrays:
    """Deal the rows of a pytree of arrays (numpy's or jax') to the ranks.

    ``batch_size``: rows per rank and step. The order is a new one in each epoch, from ``seed``
    alone. ``drop_last`` leaves out a short last step. Raises ArgumentError for arrays of different
    lengths, and MismatchError for ranks with another number of rows. Collective.
    """
    of = world if world is not None else mpizero.init()
    with of.telling():
        lengths = {int(np.shape(leaf)[0]) if np.ndim(leaf) else -1
                   for leaf in jax.tree_util.tree_leaves(arrays)}  # fmt: skip
        if len(lengths) != 1 or -1 in lengths:
            raise ArgumentError(
                "shard()", "arrays", f"a pytree of arrays with {sorted(lengths)} rows",
                "one or more arrays, all with the same number of rows",
            )  # fmt: skip
        [count] = lengths
        batches = ShardedBatches(
            count, batch_size, of.rank, of.size, shuffle=shuffle, seed=seed, drop_last=drop_last
        )
    of.agree([f"{count} rows, {batch_size} a rank and step, seed {seed}, shuffle {shuffle}, "
              f"drop_last {drop_last}"], "what to shard")  # fmt: skip
    return ShardedArrays(arrays, batches)
