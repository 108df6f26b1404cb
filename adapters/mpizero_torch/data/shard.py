"""``shard``: each rank its part of a DataLoader, a dataset, a sampler, or any stream of batches.

Every rank takes the same number of steps, and n ranks with batch size b see, step by step, what
one process with batch size n*b sees. A short last batch is dealt out too, and each rank's weight
is set so that the averaged gradient is the mean over its samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler

from mpizero import ArgumentError, World
from mpizero_torch.data.loader import ShardedLoader
from mpizero_torch.data.reading import iterates_as_dataloader
from mpizero_torch.data.sampler import ShardedSampler, refuse_dealt_dataset
from mpizero_torch.data.stream import ShardedStream
from mpizero_torch.runtime import init


def shard(
    source: Any,
    *,
    batch_size: int | None = None,
    shuffle: bool | None = None,
    seed: int | None = None,
    drop_last: bool | None = None,
    speeds: Sequence[float] | None = None,
    evaluation: bool = False,
    world: World | None = None,
    **loader_options: Any,
) -> Any:
    """This rank's part of ``source``; every rank must call it with the same arguments.

    ``source`` may be

    * a ``DataLoader``: an iterable like it comes back, whose batches have the loader's
      ``batch_size`` on each rank. Its shuffling is kept (drawn anew each epoch from ``seed``, 0 by
      default), and so are its workers, collate function and other settings. Other samplers are
      followed as rank 0 draws them, a global batch at a time, and batch samplers likewise: each
      rank loads one of the batches that they draw in a step. (Then all ranks call ``shard``
      together.)
    * a map-style dataset, with ``batch_size`` (1 by default), ``shuffle`` (True by default, but for
      evaluation) and further options of DataLoader. As for DataLoader that is whatever has a length
      and can be indexed: a Hugging Face dataset, an array, a tensor or a list, too, whose elements
      are samples. (For a list whose elements are batches: ``DataLoader(batches,
      batch_size=None)``.)
    * a ``Sampler``: a sampler of this rank's indices, for a DataLoader of one's own.
    * an ``IterableDataset``, or any other iterable of batches that is the same on all ranks: rank r
      takes every size-th batch from the r-th on.

    ``speeds``, one positive number a rank, deals out larger batches to faster ranks. Each
    ``iter()`` begins the next epoch; ``set_epoch`` says which. A rank for which nothing is left of
    the last batch gets a filler that counts nothing.

    Batches carry what they weigh, where that may differ between the ranks: their tensors know it,
    and what is computed from them; so ``DistributedDataParallel``, ``SyncBatchNorm`` and ``mean``
    do. What has gone through numpy or Python's numbers does not: a model that may be fed with such
    a batch refuses it, until its weight is stated: ``model.weigh(loader.weight)``.

    ``evaluation``: each sample is handed out once and there are no fillers, so loops may end a step
    earlier on some ranks: nothing in them may send something (nor a model at ZeRO stage 3, which
    gathers parameters; see ``gathered``). ``gather_predictions`` puts together what they find.

    What comes back (but a sampler) goes to ``mz.save`` and ``mz.load`` as ``loader=``, and then
    goes on within the epoch where it was; ``epoch`` tells in which.

    Raises ArgumentError for sources that it cannot shard, and for options that the source does not
    need.
    """
    world = world if world is not None else init()
    given = {"batch_size": batch_size, "shuffle": shuffle, "seed": seed, "drop_last": drop_last,
             "speeds": speeds, **loader_options}  # fmt: skip
    refuse_dealt_dataset(getattr(source, "dataset", source))
    if evaluation:
        _check_evaluation(source, drop_last)
    if isinstance(source, Sampler):
        _allow(given, ("shuffle", "seed", "drop_last"), "a sampler")
        return ShardedSampler(source, world, seed=seed, shuffle=shuffle, drop_last=drop_last)
    if isinstance(source, DataLoader):
        if _is_stream(source):
            _allow(given, (), "a DataLoader that alone can tell its batches")
            return ShardedStream(source, world, evaluation=evaluation)
        _allow(given, ("shuffle", "seed", "speeds"), "a DataLoader, which has its own")
        return ShardedLoader(
            source, world, shuffle=shuffle, seed=seed or 0, speeds=speeds, evaluation=evaluation
        )
    if isinstance(source, IterableDataset) and not _is_loader(source):
        _allow(given, ("batch_size", "drop_last", *loader_options), "an IterableDataset")
        loader = _loader(source, batch_size, drop_last, loader_options)
        return ShardedStream(loader, world, evaluation=evaluation)
    if not _is_loader(source) and hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        loader = _loader(source, batch_size, drop_last, loader_options)
        if shuffle is None and not {"sampler", "batch_sampler"} & {*loader_options}:
            shuffle = not evaluation
        return ShardedLoader(
            loader, world, shuffle=shuffle, seed=seed or 0, speeds=speeds, evaluation=evaluation
        )
    if isinstance(source, Iterable):
        _allow(given, (), "an iterable of batches")
        return ShardedStream(source, world, evaluation=evaluation)
    raise ArgumentError(
        "shard()",
        "source",
        f"a {type(source).__name__}",
        "a DataLoader, a dataset, a sampler, or an iterable of batches",
    )


def _loader(
    dataset: Any, batch_size: int | None, drop_last: bool | None, options: dict[str, Any]
) -> DataLoader[Any]:
    if "batch_sampler" in options:
        given = {"batch_size": batch_size, "drop_last": drop_last}
        _allow(given, (), "a batch_sampler")
        return DataLoader(dataset, **options)
    size = 1 if batch_size is None else batch_size
    return DataLoader(dataset, batch_size=size, drop_last=bool(drop_last), **options)


def _is_stream(loader: DataLoader[Any]) -> bool:
    """True if only the loader itself can tell its batches."""
    if isinstance(loader.dataset, IterableDataset):
        return True
    if not iterates_as_dataloader(loader):
        _check_same_order(loader)
        return True
    return loader.batch_size is None and loader.batch_sampler is None


def _is_loader(source: Any) -> bool:
    """Does it give batches, though it calls itself a dataset?"""
    return any(f"{kind.__module__}.{kind.__name__}" in _LOADERS for kind in type(source).__mro__)


# By name: nothing of them is imported.
_LOADERS = frozenset(["webdataset.pipeline.WebLoader", "webdataset.compat.WebLoader"])


def _check_same_order(loader: DataLoader[Any]) -> None:
    """Refuse one whose order would be drawn by each rank for itself: samples would be lost."""
    sampler = loader.sampler
    if isinstance(sampler, RandomSampler) and sampler.generator is None:
        raise ArgumentError(
            "shard()", "source", f"a {type(loader).__name__}, whose own way to iterate each rank "
            "must follow by itself, with an order that each rank draws at random",
            "an order that is the same on all ranks",
            "Seed it alike: RandomSampler(dataset, generator=torch.Generator().manual_seed(0)).",
        )  # fmt: skip


def _check_evaluation(source: Any, drop_last: bool | None) -> None:
    """Refuse what could not hand out each sample once."""
    if isinstance(source, Sampler):
        what, remedy = "a sampler, whose ends are even", "Shard the DataLoader or the dataset."
    elif drop_last or getattr(source, "drop_last", False):
        what, remedy = "drop_last=True, which leaves samples out", "Leave drop_last out."
    else:
        return
    raise ArgumentError("shard()", "evaluation", f"True beside {what}", "False", remedy)


def _allow(given: dict[str, Any], allowed: Sequence[str], source: str) -> None:
    """Refuse what would not be used."""
    for name, value in given.items():
        if value is not None and name not in allowed:
            listed = f"None beside it; {', '.join(allowed)} may be given" if allowed else "None"
            raise ArgumentError("shard()", name, f"{value!r} beside {source}", listed)
