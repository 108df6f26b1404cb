"""``ShardedSampler``: this rank's indices, for a DataLoader that the user makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import RandomSampler, Sampler, SequentialSampler

from mpizero import World
from mpizero.sampling import ShardedBatches


def is_plain(sampler: Any) -> bool:
    """True for the samplers whose order we draw ourselves, the same on every rank."""
    if isinstance(sampler, SequentialSampler):
        return True
    return (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and (sampler.num_samples == len(sampler.data_source))
    )


class ShardedSampler(Sampler[int]):
    """This rank's indices of ``sampler``, for a DataLoader that the user makes; see ``shard``.

    Every rank gets the same number of indices: a rest is filled up with the first ones again, as
    torch's DistributedSampler does, or dropped. (A sampler cannot say what the fillers weigh; shard
    the DataLoader for exact means. Nor can it say how far the training is, as loaders read ahead of
    it: what ``mz.save`` can keep of the data's position is a sharded loader's.)
    """

    def __init__(
        self,
        sampler: Sampler[int],
        world: World,
        *,
        seed: int = 0,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
    ) -> None:
        self._sampler, self._world, self._next_epoch = sampler, world, 0
        self._drop_last = bool(drop_last)
        self._plain = is_plain(sampler)
        self._count = len(sampler)  # type: ignore[arg-type]
        shuffle = isinstance(sampler, RandomSampler) if shuffle is None else shuffle
        # One "batch" a step of one sample per rank: rank r takes every size-th index.
        self._indices = ShardedBatches(
            self._count, 1, world.rank, world.size, shuffle=shuffle, seed=seed, drop_last=True
        )

    def __len__(self) -> int:
        """Indices per rank: the same on every rank."""
        whole, rest = divmod(self._count, self._world.size)
        return whole + (rest > 0 and not self._drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` begin epoch number ``epoch``."""
        self._next_epoch = epoch

    def __iter__(self) -> Iterator[int]:
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        if self._plain:
            order = self._indices.order(epoch).tolist()
        else:
            everyone = self._world if self._world.mesh is None else self._world.mesh.world
            with everyone.telling():
                own = [int(index) for index in self._sampler]
            order = everyone.broadcast_object(own)
        needed = len(self) * self._world.size
        while 0 < len(order) < needed:
            order += order[: needed - len(order)]
        return iter([int(index) for index in order[self._world.rank : needed : self._world.size]])
