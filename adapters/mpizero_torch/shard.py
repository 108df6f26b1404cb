"""``shard``: each rank its part of a DataLoader, a dataset, a sampler, or any stream of batches.

Every rank takes the same number of steps, and n ranks with batch size b see, step by step, what
one process with batch size n*b sees. A short last batch is dealt out too, and each rank's weight
is set so that the averaged gradient is the mean over its samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from mpizero import ArgumentError, World
from mpizero.sampling import Batch, ShardedBatches
from mpizero_torch import batch_weight
from mpizero_torch.runtime import init
from mpizero_torch.streams import ShardedStream


def shard(
    source: Any,
    *,
    batch_size: int | None = None,
    shuffle: bool | None = None,
    seed: int = 0,
    drop_last: bool | None = None,
    speeds: Sequence[float] | None = None,
    world: World | None = None,
    **loader_options: Any,
) -> Any:
    """This rank's part of ``source``; every rank must call it with the same arguments.

    ``source`` may be

    * a ``DataLoader``: an iterable like it comes back, whose batches have the loader's
      ``batch_size`` on each rank. Its shuffling is kept (drawn anew each epoch from ``seed``),
      and so are its workers, collate function and other settings. Other samplers are
      followed as rank 0 draws them.
    * a map-style dataset, with ``batch_size`` (1 by default), ``shuffle`` (True by default) and
      further options of DataLoader.
    * a ``Sampler``: a sampler of this rank's indices, for a DataLoader of one's own.
    * an ``IterableDataset``, or any iterable of batches that is the same on all ranks: rank r
      takes every size-th batch from the r-th on.

    ``speeds``, one positive number a rank, deals out larger batches to faster ranks. Each
    ``iter()`` begins the next epoch; ``set_epoch`` says which. While a batch is at hand, its
    weight is known to ``DistributedDataParallel``, ``SyncBatchNorm`` and ``mean``. A rank for
    which nothing is left of the last batch gets a filler that counts nothing.

    Raises ArgumentError for sources and options that it cannot shard.
    """
    world = world if world is not None else init()
    if isinstance(source, Sampler):
        _allow_none(loader_options, "a sampler")
        return ShardedSampler(source, world, seed=seed, shuffle=shuffle, drop_last=drop_last)
    if isinstance(source, DataLoader):
        _allow_none(loader_options, "a DataLoader")
        for name, value in (("batch_size", batch_size), ("drop_last", drop_last)):
            if value is not None:
                raise ArgumentError(
                    "shard()", name, f"{value} beside a DataLoader, which has its own", "None"
                )
        if _is_stream(source):
            return ShardedStream(source, world)
        return ShardedLoader(source, world, shuffle=shuffle, seed=seed, speeds=speeds)
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        loader: DataLoader[Any] = DataLoader(
            source, batch_size=batch_size or 1, drop_last=bool(drop_last), **loader_options
        )
        shuffle = True if shuffle is None else shuffle
        return ShardedLoader(loader, world, shuffle=shuffle, seed=seed, speeds=speeds)
    if isinstance(source, IterableDataset):
        stream: DataLoader[Any] = DataLoader(
            source, batch_size=batch_size or 1, drop_last=bool(drop_last), **loader_options
        )
        return ShardedStream(stream, world)
    if isinstance(source, Iterable):
        _allow_none(loader_options, "an iterable of batches")
        return ShardedStream(source, world)
    raise ArgumentError(
        "shard()",
        "source",
        f"a {type(source).__name__}",
        "a DataLoader, a dataset, a sampler, or an iterable of batches",
    )


class ShardedLoader:
    """This rank's batches of a DataLoader over a map-style dataset; see ``shard``."""

    def __init__(
        self,
        loader: DataLoader[Any],
        world: World,
        *,
        shuffle: bool | None,
        seed: int,
        speeds: Sequence[float] | None,
    ) -> None:
        if not isinstance(loader.dataset, Sized):
            raise ArgumentError("shard()", "source", "a dataset without a length", "one with it")
        self.dataset: Any = loader.dataset
        self.world = world
        self._next_epoch = 0
        self._own_sampler = None if _is_plain(loader.sampler) else loader.sampler
        count = len(self.dataset if self._own_sampler is None else loader.sampler)  # type: ignore[arg-type]
        self._batches = ShardedBatches(
            count,
            loader.batch_size or 1,
            world.rank,
            world.size,
            shuffle=isinstance(loader.sampler, RandomSampler) if shuffle is None else shuffle,
            seed=seed,
            drop_last=loader.drop_last,
            speeds=speeds,
        )
        self._plan = _Plan()
        self._loader = _with_batches(loader, self._plan)

    def __len__(self) -> int:
        """Steps in an epoch: the same on every rank."""
        return len(self._batches)

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` begin epoch number ``epoch``."""
        self._next_epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        order = None
        if self._own_sampler is not None:
            order = self.world.broadcast_object(list(self._own_sampler))
        batches = list(self._batches.epoch(epoch, order))
        self._plan.batches = batches
        return _weighted(iter(self._loader), batches)


class ShardedSampler(Sampler[int]):
    """This rank's indices of ``sampler``, for a DataLoader that the user makes; see ``shard``.

    Every rank gets the same number of indices: a rest is filled up with the first ones again, as
    torch's DistributedSampler does, or dropped. (A sampler cannot say what the fillers weigh; shard
    the DataLoader for exact means.)
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
        self._plain = _is_plain(sampler)
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
            order = self._world.broadcast_object(list(self._sampler))
        needed = len(self) * self._world.size
        while 0 < len(order) < needed:
            order += order[: needed - len(order)]
        return iter([int(index) for index in order[self._world.rank : needed : self._world.size]])


class _Plan(Sampler[list[int]]):
    """The batch sampler of a sharded loader: what ``batches`` says, in its order."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter([batch.indices.tolist() for batch in self.batches])

    def __len__(self) -> int:
        return len(self.batches)


def _weighted(loaded: Iterator[Any], batches: Sequence[Batch]) -> Iterator[Any]:
    """Announce each batch's weight while it is at hand."""
    with batch_weight.loop():
        for batch, data in zip(batches, loaded, strict=True):
            batch_weight.set_relative(batch.weight)
            yield data


def _with_batches(loader: DataLoader[Any], plan: Sampler[list[int]]) -> DataLoader[Any]:
    """A DataLoader like ``loader`` that loads the batches of ``plan``."""
    options: dict[str, Any] = {
        name: getattr(loader, name)
        for name in (
            "num_workers",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "collate_fn",
            "generator",
            "persistent_workers",
            "pin_memory_device",
        )
    }
    if loader.num_workers > 0:
        options["prefetch_factor"] = loader.prefetch_factor
        # Forked children of an MPI process may crash or hang (they share its connections); a
        # fork server is a fresh process that never had any.
        options["multiprocessing_context"] = loader.multiprocessing_context or "forkserver"
    return DataLoader(loader.dataset, batch_sampler=plan, **options)


def _is_plain(sampler: Any) -> bool:
    """True for the samplers whose order we draw ourselves, the same on every rank."""
    if isinstance(sampler, SequentialSampler):
        return True
    return (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and (sampler.num_samples == len(sampler.data_source))
    )


def _is_stream(loader: DataLoader[Any]) -> bool:
    """True if only the loader itself can tell its batches."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return True
    return type(loader.batch_sampler) is not BatchSampler


def _allow_none(options: dict[str, Any], source: str) -> None:
    if options:
        raise ArgumentError(
            "shard()", next(iter(options)), f"given beside {source}", "an option for datasets only"
        )
