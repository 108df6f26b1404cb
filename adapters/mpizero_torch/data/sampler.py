"""``ShardedSampler``: this rank's indices, for a DataLoader that the user makes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import DistributedSampler, RandomSampler, Sampler, SequentialSampler

from mpizero import ArgumentError, World
from mpizero.sampling import ShardedBatches
from mpizero_torch.data.followed import Followed

# How many indices a rank is told at a time, of what a sampler of the user's draws.
_AT_A_TIME = 64


def is_plain(sampler: Any) -> bool:
    """True for the samplers whose order we draw ourselves, the same on every rank."""
    if type(sampler) is SequentialSampler:
        return True
    return (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and (sampler.num_samples == len(sampler.data_source))
    )


def refuse_dealt(sampler: Any) -> None:
    """Raise ArgumentError for what gives this rank's part already: the rest would be lost."""
    ranks = 1
    if isinstance(sampler, DistributedSampler):
        ranks = sampler.num_replicas
    elif isinstance(sampler, ShardedSampler):
        ranks = sampler.ranks
    if ranks > 1:
        raise ArgumentError(
            "shard()", "source", f"with a {type(sampler).__name__}, which deals out to {ranks} "
            "ranks already", "a loader of all the data", "Leave the sampler out.",
        )  # fmt: skip
    inner = getattr(sampler, "sampler", None)
    if isinstance(inner, Sampler):
        refuse_dealt(inner)


def refuse_dealt_dataset(dataset: Any) -> None:
    """Raise ArgumentError for a dataset that gives each rank its own part: the rest would be lost.

    Hugging Face's ``split_dataset_by_node`` notes that; mosaicml-streaming's datasets do it where
    the environment names a rank.
    """
    ranks = getattr(getattr(dataset, "_distributed", None), "world_size", 1)
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(dataset).__mro__}
    if "streaming.base.dataset.StreamingDataset" in kinds:
        world = getattr(dataset, "_unique_rank_world", None)
        ranks = getattr(world, "num_ranks", int(os.environ.get("WORLD_SIZE", "1")))
    if ranks > 1:
        raise ArgumentError(
            "shard()", "source", f"a {type(dataset).__name__} that deals out to {ranks} ranks "
            "already", "all of the data", "Do not split it, or iterate over it without shard().",
        )  # fmt: skip


def tell_epoch(sampler: Any, epoch: int) -> bool:
    """Tell a sampler, or one in it, which epoch comes next; False if it does not want to know."""
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
            return True
        sampler = getattr(sampler, "sampler", None)
    return False


class ShardedSampler(Sampler[Any]):
    """This rank's indices of ``sampler``, for a DataLoader that the user makes; see ``shard``.

    Every rank gets the same number of indices: a rest is filled up with the first ones again, as
    torch's DistributedSampler does, or dropped. (A sampler cannot say what the fillers weigh; shard
    the DataLoader for exact means. Nor can it say how far the training is, as loaders read ahead of
    it: what ``mz.save`` can keep of the data's position is a sharded loader's.)
    """

    def __init__(
        self,
        sampler: Sampler[Any],
        world: World,
        *,
        seed: int | None = None,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
    ) -> None:
        refuse_dealt(sampler)
        self._sampler, self._world, self._next_epoch = sampler, world, 0
        self._drop_last = bool(drop_last)
        self._followed: Followed | None = None
        self._indices: ShardedBatches | None = None
        if is_plain(sampler):
            shuffle = isinstance(sampler, RandomSampler) if shuffle is None else shuffle
            # One "batch" a step of one sample per rank: rank r takes every size-th index.
            self._indices = ShardedBatches(
                self._count, 1, world.rank, world.size,
                shuffle=shuffle, seed=seed or 0, drop_last=True,
            )  # fmt: skip
            return
        for name, value in (("shuffle", shuffle), ("seed", seed)):
            if value is not None:
                what = f"{value} beside a {type(sampler).__name__}, which decides"
                raise ArgumentError("shard()", name, what, "None")
        everyone = world if world.mesh is None else world.mesh.world
        self._followed = Followed(everyone, f"indices of a {type(sampler).__name__}")
        self._places: list[int] = everyone.gather_objects(world.rank)

    @property
    def ranks(self) -> int:
        """Among how many it deals out."""
        return self._world.size

    @property
    def _count(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Indices per rank: the same on every rank."""
        whole, rest = divmod(self._count, self._world.size)
        return whole + (rest > 0 and not self._drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` begin epoch number ``epoch``; a sampler of one's own is told."""
        self._next_epoch = epoch
        if self._followed is not None:
            tell_epoch(self._sampler, epoch)

    def __iter__(self) -> Iterator[Any]:
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        if self._followed is not None:
            parts = self._followed.read(self._deal)
            return (index for part in parts for index in part)
        assert self._indices is not None
        rank, size = self._world.rank, self._world.size
        order = self._indices.order(epoch).tolist()
        needed = len(self) * size
        while 0 < len(order) < needed:
            order += order[: needed - len(order)]
        return iter(order[rank:needed:size])

    def _deal(self) -> Iterator[Sequence[Any]]:
        """On rank 0: what is drawn, in the ranks' parts, some for each at a time."""
        size = self._world.size
        drawn = iter(self._sampler)
        first: list[Any] = []
        while together := [*islice(drawn, size * _AT_A_TIME)]:
            first += together[: size - len(first)]
            rest = len(together) % size
            if rest and self._drop_last:
                del together[-rest:]
            elif rest:
                together += [first[at % len(first)] for at in range(size - rest)]
            yield [together[place::size] for place in self._places]
