"""``shard``: each rank its part of a DataLoader, a dataset, a sampler, or any stream of batches.

Every rank takes the same number of steps, and n ranks with batch size b see, step by step, what
one process with batch size n*b sees. A short last batch is dealt out too, and each rank's weight
is set so that the averaged gradient is the mean over its samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from mpizero import ArgumentError, World
from mpizero_torch.data.loader import ShardedLoader
from mpizero_torch.data.sampler import ShardedSampler
from mpizero_torch.data.stream import ShardedStream
from mpizero_torch.runtime import init


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

    What comes back (but a sampler) goes to ``mz.save`` and ``mz.load`` as ``loader=``, and then
    goes on within the epoch where it was; ``epoch`` tells in which.

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
